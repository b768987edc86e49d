//! Domains, as facts from their live XML. Pure.

mod needs;

pub use needs::Needs;
