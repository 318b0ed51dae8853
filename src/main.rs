//! The `anteroom` binary: allocator and arguments.

fn main() {}
