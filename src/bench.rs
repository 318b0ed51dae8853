//! `anteroom bench`: cold starts measured from outside, and what can be said of the measurements.

pub mod advise;
