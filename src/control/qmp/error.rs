//! Why a command failed, in QEMU's classes.

use serde::Serialize;

/// The `error` member of a reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct CommandError {
    class: ErrorClass,
    desc: String,
}

/// QEMU's classes of errors, as far as they are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum ErrorClass {
    GenericError,
    CommandNotFound,
}

impl CommandError {
    /// The command failed, or is invalid.
    pub(super) fn generic(text: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::GenericError,
            desc: text.into(),
        }
    }

    /// The command does not exist, or not in this state of the session.
    pub(super) fn not_found(text: impl Into<String>) -> Self {
        Self {
            class: ErrorClass::CommandNotFound,
            desc: text.into(),
        }
    }
}
