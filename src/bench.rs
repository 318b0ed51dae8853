//! `anteroom bench`: cold starts measured from outside, and what can be said of the measurements.

pub mod advise;
mod cold_start;
mod compare;
mod cost;
#[cfg(test)]
mod fixture;
mod html;
mod http;
pub mod results;
mod samples;
pub mod stats;
pub mod summary;
mod table;

pub use cold_start::{ColdStartArgs, run as cold_start};
pub use compare::{CompareArgs, run as compare};
pub use cost::{Cost, CostSummary};
