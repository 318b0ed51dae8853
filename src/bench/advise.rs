//! `anteroom bench advise`.

mod arrivals;
mod draw;
mod grid;
mod records;
mod replay;
mod synthetic;
