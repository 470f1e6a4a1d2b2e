//! How an input spells options, messages and descriptors.

use super::super::script::Script;

/// The size of the file of guest memory, which begins at address 0.
pub const MEMORY_BYTES: u64 = 0x1_0000;
/// The address of guest memory in the frontend.
pub const USER_ADDRESS: u64 = 0x7f00_0000_0000;

/// Option: the messages of a negotiation come before those of the input.
pub const NEGOTIATE: u8 = 1;
/// Option: messages that set up memory and virtqueues come before those of the input.
pub const START: u8 = 2;
/// Option: each message is sent in two parts, and its descriptors come with the second.
pub const PARTS: u8 = 4;

/// Kinds of descriptors, by the byte that stands for them in an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Kind {
    Memory,
    OtherMemory,
    Event,
    FullEvent,
    PipeWriter,
    PipeReader,
    Socket,
    Path,
    Zero,
    Directory,
    ReadOnlyMemory,
    SealedMemory,
    EmptyMemory,
    Epoll,
    Timer,
    Itself,
    /// 16 TiB of it, all holes.
    SparseMemory,
    /// In it lies another one, unread.
    FilledSocket,
    NetworkSocket,
}

impl Kind {
    /// How many there are, so that a byte of an input stands for one.
    pub const COUNT: u8 = 19;
}

/// The codes of messages.
pub mod code {
    #![allow(missing_docs, reason = "named as in the specification")]
    pub const GET_FEATURES: u8 = 1;
    pub const SET_FEATURES: u8 = 2;
    pub const SET_OWNER: u8 = 3;
    pub const SET_MEM_TABLE: u8 = 5;
    pub const SET_LOG_BASE: u8 = 6;
    pub const SET_VRING_NUM: u8 = 8;
    pub const SET_VRING_ADDR: u8 = 9;
    pub const SET_VRING_BASE: u8 = 10;
    pub const GET_VRING_BASE: u8 = 11;
    pub const SET_VRING_KICK: u8 = 12;
    pub const SET_VRING_CALL: u8 = 13;
    pub const SET_VRING_ERR: u8 = 14;
    pub const GET_PROTOCOL_FEATURES: u8 = 15;
    pub const SET_PROTOCOL_FEATURES: u8 = 16;
    pub const GET_QUEUE_NUM: u8 = 17;
    pub const SET_VRING_ENABLE: u8 = 18;
    pub const SET_BACKEND_REQ_FD: u8 = 21;
    pub const GET_CONFIG: u8 = 24;
    pub const SET_CONFIG: u8 = 25;
    pub const GET_INFLIGHT_FD: u8 = 31;
    pub const SET_INFLIGHT_FD: u8 = 32;
    pub const RESET_DEVICE: u8 = 34;
    pub const GET_MAX_MEM_SLOTS: u8 = 36;
    pub const ADD_MEM_REG: u8 = 37;
    pub const REM_MEM_REG: u8 = 38;
}

/// A message as an input spells it.
pub struct Message<'a> {
    /// The code, or 0xff if the payload begins with a header.
    pub code: u8,
    /// Flags other than the version. If bit 0 is set, the version is wrong.
    pub flags: u8,
    /// The difference between the size in the header and the size of the payload.
    pub surplus: i8,
    /// The bytes behind the header.
    pub payload: &'a [u8],
    /// The descriptors that come with the message.
    pub kinds: &'a [u8],
}

impl<'a> Message<'a> {
    pub(super) fn read(script: &mut Script<'a>) -> Self {
        let (code, flags, surplus) = (script.u8(), script.u8(), script.u8().cast_signed());
        let bytes = script.u8().into();
        let payload = script.take(bytes);
        let kinds = (script.u8() & 0x3f).into();
        Self {
            code,
            flags,
            surplus,
            payload,
            kinds: script.take(kinds),
        }
    }

    /// The bytes of an input that spell the message.
    pub fn input(&self) -> Vec<u8> {
        let small = |slice: &[u8]| u8::try_from(slice.len()).expect("a short message");
        let mut input = vec![
            self.code,
            self.flags,
            self.surplus.cast_unsigned(),
            small(self.payload),
        ];
        input.extend(self.payload);
        input.push(small(self.kinds));
        input.extend(self.kinds);
        input
    }

    /// The bytes on the socket.
    pub(super) fn bytes(&self) -> Vec<u8> {
        if self.code == u8::MAX {
            return self.payload.to_vec();
        }
        let size = self
            .payload
            .len()
            .saturating_add_signed(self.surplus.into());
        let size = u32::try_from(size).expect("a short message");
        let header = [self.code.into(), u32::from(self.flags ^ 1), size];
        let mut bytes = header.map(u32::to_ne_bytes).concat();
        bytes.extend(self.payload);
        bytes
    }
}
