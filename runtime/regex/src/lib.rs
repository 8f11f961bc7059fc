//! Stands for the `regex` crate in this workspace (`[patch.crates-io]`, decision 0009).
//!
//! Two patterns of oci-spec are all that is matched here: an image reference and a CPU list. The
//! full engine, with its Unicode tables, was an eighth of `coracle`, which is mapped at every start
//! of a container. `\d` and `\w` mean ASCII here, as the grammars of both do.
#![forbid(unsafe_code)]

pub use regex_lite::{Captures, Error, Match, Regex, RegexBuilder};
