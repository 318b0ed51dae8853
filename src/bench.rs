//! `anteroom bench`: measures cold starts from outside and evaluates the results.

pub(crate) mod advise;
mod cold_start;
mod compare;
mod cost;
#[cfg(test)]
mod fixture;
mod html;
mod http;
pub mod results;
mod samples;
mod stats;
mod summary;
mod table;

pub use cold_start::{ColdStartArgs, run as cold_start};
pub use compare::{CompareArgs, run as compare};
