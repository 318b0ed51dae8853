//! Measures Anteroom against plain reverse proxies on this machine.

fn main() {}
