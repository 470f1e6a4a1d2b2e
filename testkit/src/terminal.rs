//! A program on a terminal (a pty): what it draws can be read, and it can be typed to.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::HANG_LIMIT;
use crate::process::{Process, wait_until};

/// The program and its terminal. It is killed when dropped.
pub struct Terminal {
    // Dropped first, which ends the thread that reads from the terminal.
    process: Process,
    master: File,
    drawn: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    /// Starts the program as the first one of a terminal of this many columns.
    pub fn start(mut command: Command, columns: u16) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("making a terminal");
        grantpt(&master).expect("granting a terminal");
        unlockpt(&master).expect("unlocking a terminal");
        let size = Winsize {
            ws_row: 50,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&master, size).expect("sizing a terminal");
        let name = ptsname(&master, Vec::new()).expect("naming a terminal");
        let slave = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(name.to_str().expect("a name in UTF-8"))
            .expect("opening a terminal");
        let copy = || slave.try_clone().expect("duplicating a terminal");
        command.stdin(copy()).stdout(copy()).stderr(copy());
        let process = Process::spawn_in_session(&mut command).expect("starting a program");
        // Else its end would be open here.
        drop((command, slave));
        let master = File::from(master);
        let drawn = Arc::new(Mutex::new(Vec::new()));
        thread::spawn({
            let drawn = Arc::clone(&drawn);
            let mut master = master.try_clone().expect("duplicating a terminal");
            move || {
                let mut bytes = [0; 4096];
                // An error when the last one that could write is gone.
                while let Ok(count @ 1..) = master.read(&mut bytes) {
                    let drawn = drawn.lock();
                    drawn
                        .expect("the reader of a terminal panicked")
                        .extend_from_slice(&bytes[..count]);
                }
            }
        });
        Self {
            process,
            master,
            drawn,
        }
    }

    /// The id of its process.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Types this.
    pub fn type_in(&mut self, keys: &str) {
        let typed = self.master.write_all(keys.as_bytes());
        typed.expect("typing to a terminal");
    }

    /// All that was drawn so far.
    pub fn drawn(&self) -> String {
        let drawn = self
            .drawn
            .lock()
            .expect("the reader of a terminal panicked");
        String::from_utf8_lossy(&drawn).into_owned()
    }

    /// Waits until the condition holds.
    ///
    /// # Panics
    /// If it does not within [`HANG_LIMIT`]; with what was drawn.
    pub fn wait_until(&self, what: &str, condition: impl FnMut() -> bool) {
        let holds = wait_until(HANG_LIMIT, condition);
        assert!(holds, "{what}; drawn: {:?}", self.drawn());
    }
}
