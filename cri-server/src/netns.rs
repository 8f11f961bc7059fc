//! Pins pod namespaces to files.
