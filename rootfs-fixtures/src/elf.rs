//! Reads of an ELF file what the dynamic linker would: the interpreter and the needed libraries.
//! 64-bit little-endian only, which is what the images are built for.

use anyhow::{Context as _, Result, ensure};

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Dynamic {
    pub interpreter: Option<String>,
    pub needed: Vec<String>,
}

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    size: u64,
}

/// A static program has neither an interpreter nor needed libraries.
pub fn dynamic(file: &[u8]) -> Result<Dynamic> {
    ensure!(file.get(..4) == Some(b"\x7fELF"), "not an ELF file");
    ensure!(file.get(4..6) == Some(&[2, 1]), "not 64-bit little-endian");
    let table = u64_at(file, 32)?;
    let entry_size = u64::from(u16_at(file, 54)?);
    let count = u64::from(u16_at(file, 56)?);
    let mut segments = Vec::new();
    for n in 0..count {
        let at = table + n * entry_size;
        segments.push(Segment {
            kind: u32_at(file, at)?,
            offset: u64_at(file, at + 8)?,
            address: u64_at(file, at + 16)?,
            size: u64_at(file, at + 32)?,
        });
    }

    let mut found = Dynamic::default();
    if let Some(interp) = segments.iter().find(|s| s.kind == PT_INTERP) {
        found.interpreter = Some(string_at(file, interp.offset)?);
    }
    let Some(section) = segments.iter().find(|s| s.kind == PT_DYNAMIC) else {
        return Ok(found);
    };
    let mut names = Vec::new();
    let mut strings = None;
    for at in (section.offset..section.offset + section.size).step_by(16) {
        match u64_at(file, at)? {
            0 => break,
            DT_NEEDED => names.push(u64_at(file, at + 8)?),
            DT_STRTAB => strings = Some(u64_at(file, at + 8)?),
            _ => {}
        }
    }
    if names.is_empty() {
        return Ok(found);
    }
    let address = strings.context("no string table")?;
    let base = segments
        .iter()
        .find(|s| s.kind == PT_LOAD && (s.address..s.address + s.size).contains(&address))
        .map(|s| address - s.address + s.offset)
        .context("string table outside every segment")?;
    for name in names {
        found.needed.push(string_at(file, base + name)?);
    }
    Ok(found)
}

fn bytes_at<const N: usize>(file: &[u8], at: u64) -> Result<[u8; N]> {
    let at = usize::try_from(at)?;
    let slice = file
        .get(at..at.saturating_add(N))
        .context("truncated ELF file")?;
    Ok(slice.try_into()?)
}

fn u16_at(file: &[u8], at: u64) -> Result<u16> {
    Ok(u16::from_le_bytes(bytes_at(file, at)?))
}

fn u32_at(file: &[u8], at: u64) -> Result<u32> {
    Ok(u32::from_le_bytes(bytes_at(file, at)?))
}

fn u64_at(file: &[u8], at: u64) -> Result<u64> {
    Ok(u64::from_le_bytes(bytes_at(file, at)?))
}

fn string_at(file: &[u8], at: u64) -> Result<String> {
    let rest = file
        .get(usize::try_from(at)?..)
        .context("truncated ELF file")?;
    let end = rest
        .iter()
        .position(|b| *b == 0)
        .context("unterminated string")?;
    Ok(String::from_utf8(rest[..end].to_vec())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dynamic_of_host_shell_names_libc_and_interpreter() {
        let shell = std::fs::read("/bin/sh").unwrap();
        let found = dynamic(&shell).unwrap();
        assert!(
            found.needed.iter().any(|n| n.starts_with("libc.so")),
            "{found:?}"
        );
        assert!(found.interpreter.unwrap().contains("ld-linux"));
    }

    #[test]
    fn dynamic_of_garbage_is_an_error() {
        assert!(dynamic(b"#!/bin/sh").is_err());
        assert!(dynamic(b"\x7fELF\x02\x01").is_err());
    }
}
