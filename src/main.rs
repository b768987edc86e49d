//! The `virtnode` command.

fn main() {}
