//! The `virtnode` command.

fn main() {
    virtnode::ffi::leave(virtnode::cli::main().code());
}
