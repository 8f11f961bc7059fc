//! Links `coracle` without position independence, and with an entry point of its own.
//!
//! It starts several times for each container, and as a static PIE it first relocates itself: 10,000
//! entries over 50 pages, each a copy-on-write fault, 100 us or more at every start. What it gives up is a
//! random address of its own text; stack, heap and mappings stay random. The program lives for
//! milliseconds and takes no input from a network.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for argument in ["-no-pie", "-static"] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    // The entry point of coracle_sys::entry, which seals the binary before the C library starts.
    if std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64") {
        println!("cargo::rustc-link-arg-bins=-Wl,--entry=coracle_start");
    }
}
