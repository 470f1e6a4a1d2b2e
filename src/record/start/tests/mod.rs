//! What may start, and with what.

mod cases;
mod choices;
mod daemon;
mod disk;
mod histories;
mod model;
mod refusals;
