//! runtime/sys
