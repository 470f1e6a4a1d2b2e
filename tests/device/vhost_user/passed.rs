//! Connections whose end may take long: unread replies, and descriptors that are slow to close.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use quorum_blk::limits::CONNECTIONS_MAX;
use testkit::HANG_LIMIT;
use testkit::fuse::FuseImage;
use testkit::process::wait_until;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::Setup;

const GET_FEATURES: u32 = 1;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const SET_PROTOCOL_FEATURES: u32 = 16;

fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap();
    let mut message = [request, flags, size].map(u32::to_ne_bytes).concat();
    message.extend(body);
    message
}

fn connect(setup: &Setup) -> UnixStream {
    UnixStream::connect(setup.daemon.socket()).unwrap()
}

#[test]
fn replies_that_are_never_read_hold_up_no_other_frontend() {
    let mut setup = Setup::new(&[]);
    let connections: Vec<_> = (0..CONNECTIONS_MAX).map(|_| connect(&setup)).collect();
    for mut connection in &connections {
        // Until the daemon has no room for replies, and reads no more.
        connection
            .set_write_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let messages = message(GET_FEATURES, 1, &[]).repeat(1024);
        while connection.write_all(&messages).is_ok() {}
        let _ = connection.shutdown(Shutdown::Write);
    }
    setup.assert_serves("unread replies");
    setup.end();
    drop(connections);
}

/// A socket whose close waits for an hour: what it has to send stays unread.
fn lingering() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.write(&[0; 1 << 16]).is_ok() {}
    socket.set_nonblocking(false).unwrap();
    let linger = Some(Duration::from_secs(3600));
    rustix::net::sockopt::set_socket_linger(&socket, linger).unwrap();
    (socket, peer)
}

/// Sends a message with a descriptor.
fn pass(connection: &UnixStream, message: &[u8], descriptor: RawFd) {
    connection.send_with_fds(&[message], &[descriptor]).unwrap();
}

/// Sends messages of which the last one passes a lingering socket.
fn pass_lingering(setup: &mut Setup, messages: &[Vec<u8>]) -> (UnixStream, TcpStream) {
    let (socket, peer) = lingering();
    (pass_last(setup, messages, socket), peer)
}

/// Sends messages of which the last one passes a socket in which a lingering one lies unread.
fn pass_nested(setup: &mut Setup, messages: &[Vec<u8>]) -> (UnixStream, TcpStream) {
    let (socket, peer) = lingering();
    let (outer, sender) = UnixStream::pair().unwrap();
    pass(&sender, &[1], socket.as_raw_fd());
    drop(socket);
    (pass_last(setup, messages, outer), peer)
}

/// Sends messages of which the last one passes a socket. The daemon is the last that closes it: it
/// does not run meanwhile.
fn pass_last(setup: &mut Setup, messages: &[Vec<u8>], socket: impl AsRawFd) -> UnixStream {
    setup.daemon.signal(libc::SIGSTOP);
    let connection = connect(setup);
    let (last, others) = messages.split_last().unwrap();
    for message in others {
        (&connection).write_all(message).unwrap();
    }
    pass(&connection, last, socket.as_raw_fd());
    drop(socket);
    setup.daemon.signal(libc::SIGCONT);
    connection
}

/// How a lingering socket is passed.
type Pass = fn(&mut Setup, &[Vec<u8>]) -> (UnixStream, TcpStream);

/// Waits until the daemon ends the connection.
fn wait_for_end(mut connection: &UnixStream, what: &str) {
    connection.set_read_timeout(Some(HANG_LIMIT)).unwrap();
    match connection.read(&mut [0]) {
        Ok(count) => assert_eq!(count, 0, "{what} is answered"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{what}"),
    }
}

#[test]
fn sockets_that_linger_hold_up_no_other_frontend() {
    for (request, pass) in [
        (SET_VRING_ERR, pass_lingering as Pass),
        (SET_VRING_CALL, pass_lingering),
        (SET_MEM_TABLE, pass_lingering),
        (SET_VRING_ERR, pass_nested),
        (SET_MEM_TABLE, pass_nested),
    ] {
        let mut setup = Setup::new(&[]);
        let mut peers = Vec::new();
        // More than there are connections.
        for _ in 0..2 * CONNECTIONS_MAX {
            let messages = [message(request, 1, &[0; 8])];
            let (connection, peer) = pass(&mut setup, &messages);
            wait_for_end(&connection, "a lingering socket");
            peers.push(peer);
        }
        setup.assert_serves("sockets that linger");
        setup.end();
    }
}

/// The socket comes with the header, and it comes with a part of the body.
#[test]
fn sockets_that_linger_in_the_middle_of_a_message_hold_up_no_other_frontend() {
    for (request, first_bytes) in [(SET_VRING_ERR, 4), (SET_VRING_ERR, 12), (1000, 14)] {
        let mut setup = Setup::new(&[]);
        let mut peers = Vec::new();
        for _ in 0..2 * CONNECTIONS_MAX {
            let whole = message(request, 1, &[0; 8]);
            let (first, rest) = whole.split_at(first_bytes);
            let parts = [first.to_vec(), rest.to_vec()];
            let (connection, peer) = pass_lingering(&mut setup, &parts);
            wait_for_end(&connection, "a lingering socket");
            peers.push(peer);
        }
        setup.assert_serves("sockets in the middle of a message");
        setup.end();
    }
}

/// What is unread is closed with the connection.
#[test]
fn sockets_that_linger_unread_hold_up_no_other_frontend() {
    let mut setup = Setup::new(&[]);
    let mut peers = Vec::new();
    for _ in 0..2 * CONNECTIONS_MAX {
        // The first message ends the connection.
        let messages = [
            message(GET_FEATURES, 2, &[]),
            message(SET_VRING_ERR, 1, &[0; 8]),
        ];
        let (connection, peer) = pass_lingering(&mut setup, &messages);
        wait_for_end(&connection, "a message of another version");
        drop(connection);
        peers.push(peer);
    }
    setup.assert_serves("sockets that linger unread");
    setup.end();
}

#[test]
fn guest_memory_that_another_process_serves_is_refused() {
    let mut setup = Setup::new(&[]);
    let backing = setup.directory.path().join("backing");
    File::create(&backing).unwrap().set_len(1 << 20).unwrap();
    let image = FuseImage::serve(&backing);
    let file = File::options()
        .read(true)
        .write(true)
        .open(image.path())
        .unwrap();
    let connection = connect(&setup);
    let region = [1, 0, 1 << 20, 1 << 30, 0_u64];
    let body: Vec<u8> = region.into_iter().flat_map(u64::to_ne_bytes).collect();
    pass(
        &connection,
        &message(SET_MEM_TABLE, 1, &body),
        file.as_raw_fd(),
    );
    wait_for_end(&connection, "memory on FUSE");
    let is_said = || setup.daemon.log().contains("such as FUSE");
    assert!(wait_until(HANG_LIMIT, is_said));
    setup.assert_serves("memory on FUSE");
    setup.end();
}

/// Reads the acknowledgement of a message.
fn acknowledgement(mut connection: &UnixStream, request: u32) -> u64 {
    let mut reply = [0; 20];
    connection.set_read_timeout(Some(HANG_LIMIT)).unwrap();
    connection.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..4], request.to_ne_bytes());
    assert_eq!(reply[4..12], [5_u32, 8].map(u32::to_ne_bytes).concat());
    u64::from_ne_bytes(reply[12..].try_into().unwrap())
}

/// A socket passes bytes, not messages: several may come at once, and each in parts.
#[test]
fn messages_may_come_in_parts() {
    let mut setup = Setup::new(&[]);
    let connection = connect(&setup);
    let call = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
    let features = VhostUserProtocolFeatures::REPLY_ACK.bits().to_ne_bytes();
    let set_up = [
        message(GET_FEATURES, 1, &[]),
        message(2, 1, &(1_u64 << 30).to_ne_bytes()),
        message(SET_PROTOCOL_FEATURES, 1, &features),
    ];
    for byte in set_up.concat() {
        (&connection).write_all(&[byte]).unwrap();
    }
    assert_ne!(acknowledgement(&connection, GET_FEATURES), 0);
    // The descriptor belongs to the message with whose last byte it comes, and not to the next.
    let set_call = message(SET_VRING_CALL, 9, &0_u64.to_ne_bytes());
    let (last, others) = set_call.split_last().unwrap();
    for byte in others {
        (&connection).write_all(&[*byte]).unwrap();
    }
    pass(&connection, &[*last], call.as_raw_fd());
    let get = message(GET_FEATURES, 1, &[]);
    (&connection).write_all(&get).unwrap();
    assert_eq!(acknowledgement(&connection, SET_VRING_CALL), 0);
    assert_ne!(acknowledgement(&connection, GET_FEATURES), 0);
    setup.assert_serves("messages in parts");
    setup.end();
}

#[test]
fn an_unknown_message_is_refused_where_a_reply_is_due_and_else_ignored() {
    let mut setup = Setup::new(&[]);
    let mut connection = connect(&setup);
    let features = VhostUserProtocolFeatures::REPLY_ACK.bits();
    for request in [0, 7, 19, 20, 22, 23, 26, 27, 29, 35, 39, 45, 1000, u32::MAX] {
        for body in [&[][..], &[0xff; 8], &[0; 4096]] {
            connection.write_all(&message(request, 1, body)).unwrap();
            // Without the protocol feature no reply is due.
            if request == 0 {
                connection.write_all(&message(request, 9, body)).unwrap();
            }
        }
    }
    let set = message(SET_PROTOCOL_FEATURES, 1, &features.to_ne_bytes());
    connection
        .write_all(&message(2, 1, &(1_u64 << 30).to_ne_bytes()))
        .unwrap();
    connection.write_all(&set).unwrap();
    for request in [0, 7, 19, 35, 45, 1000] {
        connection.write_all(&message(request, 9, &[0; 8])).unwrap();
        assert_ne!(acknowledgement(&connection, request), 0);
    }
    connection
        .write_all(&message(GET_FEATURES, 1, &[]))
        .unwrap();
    assert_ne!(acknowledgement(&connection, GET_FEATURES), 0);
    setup.assert_serves("unknown messages");
    setup.end();
}
