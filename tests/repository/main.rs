//! The repository itself: the contract names what exists, the words are those of the glossary, and
//! lines are short enough to read.

mod contract;
mod crash_plot;
mod files;
mod lines;
mod pages;
mod rooms;
mod source;
mod words;
