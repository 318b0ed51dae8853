//! `anteroom bench`: cold starts measured from outside, and what can be said of the measurements.

pub mod advise;
mod cold_start;
mod cost;
mod html;
mod http;
pub mod results;
mod samples;
pub mod stats;
pub mod summary;
mod table;

pub use cold_start::{ColdStartArgs, run as cold_start};
pub use cost::{Cost, CostSummary};
