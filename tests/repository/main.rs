//! The repository itself: the contract and the pages name what exists, and imports go one way.

mod contract;
mod files;
mod pages;
mod rooms;
mod source;
