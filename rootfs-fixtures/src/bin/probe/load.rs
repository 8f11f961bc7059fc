//! Commands that use a resource in a known amount: output, memory, CPU, signals.

use std::hint::black_box;
use std::io::{BufWriter, Read as _, Write as _};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use sha2::{Digest as _, Sha256};

/// Page size of every machine this runs on; touching more often than needed does no harm.
const PAGE: usize = 4096;

pub fn sink() -> anyhow::Result<()> {
    let mut input = std::io::stdin().lock();
    let mut hash = Sha256::new();
    let mut total = 0u64;
    let mut buffer = vec![0; 1 << 16];
    loop {
        match input.read(&mut buffer)? {
            0 => break,
            n => {
                hash.update(&buffer[..n]);
                total += n as u64;
            }
        }
    }
    let digest: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    super::print(&format!("{total} {digest}\n"))?;
    Ok(())
}

/// The same bytes for the same count, so that a test can compute their hash by itself.
pub fn source(bytes: u64) -> anyhow::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 16, std::io::stdout().lock());
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut left = bytes;
    while left > 0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = state.to_le_bytes();
        let n = left.min(8);
        out.write_all(&word[..n as usize])?;
        left -= n;
    }
    out.flush()?;
    Ok(())
}

pub fn lines(count: u64, pause_us: u64) -> anyhow::Result<()> {
    let mut n = 0;
    while count == 0 || n < count {
        super::print(&format!("line {n}\n"))?;
        n += 1;
        if pause_us > 0 {
            std::thread::sleep(Duration::from_micros(pause_us));
        }
    }
    Ok(())
}

pub fn flood(count: u64, length: usize) -> anyhow::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 16, std::io::stdout().lock());
    for n in 0..count {
        let head = format!("line {n} ");
        let fill = length.saturating_sub(head.len() + 1);
        out.write_all(head.as_bytes())?;
        out.write_all(&vec![b'x'; fill])?;
        out.write_all(b"\n")?;
    }
    out.flush()?;
    Ok(())
}

pub fn eat(mib: usize, seconds: f64) -> anyhow::Result<()> {
    let mut held: Vec<Vec<u8>> = Vec::new();
    for n in 0..mib {
        let mut block = vec![0u8; 1 << 20];
        for at in (0..block.len()).step_by(PAGE) {
            // Not a constant: equal pages must not be merged.
            block[at] = (n ^ at) as u8 | 1;
        }
        held.push(black_box(block));
    }
    super::print(&format!("ate {mib} MiB\n"))?;
    std::thread::sleep(Duration::from_secs_f64(seconds));
    black_box(&held);
    Ok(())
}

pub fn burn(threads: usize, seconds: f64) {
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    let workers: Vec<_> = (0..threads.max(1))
        .map(|_| {
            std::thread::spawn(move || {
                let mut x = 1u64;
                while Instant::now() < end {
                    for _ in 0..10_000 {
                        x = black_box(x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
                    }
                }
            })
        })
        .collect();
    for worker in workers {
        let _ = worker.join();
    }
}

/// A stop signal that is not KILL is seen here by its name.
pub fn trap(code: u8) -> anyhow::Result<u8> {
    let mut set = SigSet::empty();
    for signal in Signal::iterator() {
        if !matches!(signal, Signal::SIGKILL | Signal::SIGSTOP | Signal::SIGCHLD) {
            set.add(signal);
        }
    }
    set.thread_block()?;
    super::print("ready\n")?;
    let signal = set.wait()?;
    super::print(&format!("got {}\n", signal.as_str()))?;
    Ok(code)
}
