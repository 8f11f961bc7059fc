//! runtime/oci
