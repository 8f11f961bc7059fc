//! Compiled programs kept under the state root, so that a profile seen before is not compiled.
//!
//! A file is named by the hash of everything the program depends on and holds a digest and the
//! program. It is believed only if it belongs to us, nobody else may touch it, and the digest
//! fits; else the profile is compiled again. A cache that cannot be written is no error.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use coracle_oci::config::spec::LinuxSeccomp;
use sha2::{Digest as _, Sha256};

use super::{Abi, Compiled, MAX_PROGRAM, SockFilter, compile, profile};
use crate::error::Result;

/// No container id has an `@`.
const DIRECTORY: &str = "@seccomp";
/// Changes whenever the same profile may compile to another program.
const COMPILER: &str = concat!("coracle seccomp 2 ", env!("CARGO_PKG_VERSION"));
const DIGEST: usize = 32;
const INSTRUCTION: usize = 8;
/// More profiles than any host uses; past it the cache starts afresh.
const MAX_FILES: usize = 256;

/// The compiled profile, from the cache under `root` if it is there.
pub fn load_or_compile(root: &Path, seccomp: &LinuxSeccomp, native: Abi) -> Result<Compiled> {
    let terms = profile::terms(seccomp)?;
    let Some(path) = path_of(root, seccomp, native) else {
        return compile(seccomp, native);
    };
    if let Some(program) = load(&path) {
        return Ok(terms.with(program));
    }
    let compiled = compile(seccomp, native)?;
    // The next start compiles again: slower, not wrong.
    let _ = store(&path, &compiled.program);
    Ok(compiled)
}

fn path_of(root: &Path, seccomp: &LinuxSeccomp, native: Abi) -> Option<PathBuf> {
    let mut hash = Sha256::new();
    hash.update(COMPILER);
    hash.update([native as u8]);
    hash.update(serde_json::to_vec(seccomp).ok()?);
    let name: String = hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Some(root.join(DIRECTORY).join(name))
}

fn load(path: &Path) -> Option<Vec<SockFilter>> {
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(path)
        .ok()?;
    let length = verified_length(&file)?;
    let mut bytes = vec![0; length];
    file.read_exact(&mut bytes).ok()?;
    let (digest, program) = bytes.split_at(DIGEST);
    if digest != Sha256::digest(program).as_slice() {
        return None;
    }
    Some(program.chunks_exact(INSTRUCTION).map(decode).collect())
}

/// The length of a file that only we can have written.
fn verified_length(file: &File) -> Option<usize> {
    let meta = file.metadata().ok()?;
    let length = usize::try_from(meta.len()).ok()?;
    let program = length.checked_sub(DIGEST)?;
    let ours = meta.is_file()
        && meta.uid() == rustix::process::geteuid().as_raw()
        && meta.mode() & 0o7777 == 0o600;
    let whole = program != 0 && program % INSTRUCTION == 0 && program / INSTRUCTION <= MAX_PROGRAM;
    (ours && whole).then_some(length)
}

fn store(path: &Path, program: &[SockFilter]) -> std::io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut builder = fs::DirBuilder::new();
    match builder.mode(0o700).create(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    if fs::read_dir(directory)?.count() >= MAX_FILES {
        for entry in fs::read_dir(directory)?.flatten() {
            let _ = fs::remove_file(entry.path());
        }
    }
    let program: Vec<u8> = program.iter().flat_map(encode).collect();
    // Named by process: two starts at once write the same content to different files.
    let fresh = path.with_extension(std::process::id().to_string());
    let _ = fs::remove_file(&fresh);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&fresh)?;
    let written = file
        .write_all(&Sha256::digest(&program))
        .and_then(|()| file.write_all(&program))
        .and_then(|()| fs::rename(&fresh, path));
    if written.is_err() {
        let _ = fs::remove_file(&fresh);
    }
    written
}

fn encode(instruction: &SockFilter) -> [u8; INSTRUCTION] {
    let [c0, c1] = instruction.code.to_le_bytes();
    let [k0, k1, k2, k3] = instruction.k.to_le_bytes();
    [c0, c1, instruction.jt, instruction.jf, k0, k1, k2, k3]
}

fn decode(bytes: &[u8]) -> SockFilter {
    SockFilter {
        code: u16::from_le_bytes([bytes[0], bytes[1]]),
        jt: bytes[2],
        jf: bytes[3],
        k: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn profile() -> LinuxSeccomp {
        serde_json::from_str(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
                {"names":["read","write"],"action":"SCMP_ACT_ALLOW"}]}"#,
        )
        .unwrap()
    }

    fn words(program: &[SockFilter]) -> Vec<[u8; INSTRUCTION]> {
        program.iter().map(encode).collect()
    }

    #[test]
    fn a_stored_program_is_loaded_and_a_doubtful_one_is_not() {
        let root = tempfile::tempdir().unwrap();
        let profile = profile();
        let fresh = load_or_compile(root.path(), &profile, Abi::X86_64).unwrap();
        let path = path_of(root.path(), &profile, Abi::X86_64).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(
            fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777,
            0o700
        );
        assert_eq!(words(&load(&path).unwrap()), words(&fresh.program));

        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(load(&path).is_none(), "readable by others");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();

        let good = fs::read(&path).unwrap();
        fs::write(&path, &good[..good.len() - 3]).unwrap();
        assert!(load(&path).is_none(), "truncated");
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        fs::write(&path, &flipped).unwrap();
        assert!(load(&path).is_none(), "a flipped bit");
        fs::write(&path, &good[..DIGEST]).unwrap();
        assert!(load(&path).is_none(), "empty program");

        fs::remove_file(&path).unwrap();
        let elsewhere = root.path().join("elsewhere");
        fs::write(&elsewhere, &good).unwrap();
        fs::set_permissions(&elsewhere, fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        assert!(load(&path).is_none(), "a symlink");
        let again = load_or_compile(root.path(), &profile, Abi::X86_64).unwrap();
        assert_eq!(words(&again.program), words(&fresh.program));
        assert_eq!(words(&load(&path).unwrap()), words(&fresh.program));
    }

    #[test]
    fn profiles_and_architectures_have_files_of_their_own() {
        let root = Path::new("/r");
        let mut other = profile();
        other.set_default_errno_ret(Some(2));
        let paths = [
            path_of(root, &profile(), Abi::X86_64),
            path_of(root, &profile(), Abi::Aarch64),
            path_of(root, &other, Abi::X86_64),
        ];
        assert!(paths.iter().all(Option::is_some));
        assert!(paths[0] != paths[1] && paths[0] != paths[2]);
    }

    #[test]
    fn an_unwritable_cache_still_compiles() {
        let compiled =
            load_or_compile(Path::new("/proc/self/fdinfo"), &profile(), Abi::X86_64).unwrap();
        assert!(!compiled.program.is_empty());
    }
}
