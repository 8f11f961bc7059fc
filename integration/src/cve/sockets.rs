//! I11: a seccomp profile that refuses AF_ALG and AF_VSOCK, asked by every ABI that the kernel
//! runs: x86_64, i386 by int 0x80 (socket and socketcall), x32.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::stage::Stage;
use super::{Case, Verdict};

pub(super) fn cases() -> Vec<Case> {
    vec![Case {
        cve: "kernel 2022-36123 class",
        tried: "AF_ALG and AF_VSOCK under a profile that refuses them: x86_64, i386, x32",
        run: families,
    }]
}

/// Where and how a socket is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Abi {
    Native,
    /// int 0x80, socket(2) by its own number.
    I386,
    /// int 0x80, socketcall(2).
    I386Call,
    X32,
}

const ABIS: [Abi; 4] = [Abi::Native, Abi::I386, Abi::I386Call, Abi::X32];

const ADDRESS: u32 = 0x0040_0000;
const HEADERS: u32 = 64 + 56;

/// A program of a few instructions: exits with 0 when the socket was made, else with the error.
fn program(abi: Abi, family: u32) -> Vec<u8> {
    let mut code: Vec<u8> = Vec::new();
    let number = |code: &mut Vec<u8>, opcode: u8, value: u32| {
        code.push(opcode);
        code.extend(value.to_le_bytes());
    };
    let (eax, ebx, ecx, edx, esi, edi) = (0xb8, 0xbb, 0xb9, 0xba, 0xbe, 0xbf);
    const SEQPACKET: u32 = 5;
    match abi {
        Abi::Native | Abi::X32 => {
            number(
                &mut code,
                eax,
                if abi == Abi::X32 {
                    0x4000_0000 + 41
                } else {
                    41
                },
            );
            number(&mut code, edi, family);
            number(&mut code, esi, SEQPACKET);
            number(&mut code, edx, 0);
            code.extend([0x0f, 0x05]);
        }
        Abi::I386 => {
            number(&mut code, eax, 359);
            number(&mut code, ebx, family);
            number(&mut code, ecx, SEQPACKET);
            number(&mut code, edx, 0);
            code.extend([0xcd, 0x80]);
        }
        Abi::I386Call => {
            number(&mut code, eax, 102);
            number(&mut code, ebx, 1);
            // The arguments stand at the end of the program: see below.
            number(&mut code, ecx, ADDRESS + HEADERS + 64);
            code.extend([0xcd, 0x80]);
        }
    }
    // edi = eax < 0 ? -eax : 0; exit(edi)
    code.extend([0x31, 0xff, 0x85, 0xc0, 0x79, 0x04, 0x89, 0xc7, 0xf7, 0xdf]);
    number(&mut code, eax, 231);
    code.extend([0x0f, 0x05]);
    code.resize(64, 0);
    for argument in [family, SEQPACKET, 0] {
        code.extend(argument.to_le_bytes());
    }
    elf(&code)
}

/// The smallest static program: one header, one segment.
fn elf(code: &[u8]) -> Vec<u8> {
    let size = u64::from(HEADERS) + code.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes());
    file.extend(62u16.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    file.extend(u64::from(ADDRESS + HEADERS).to_le_bytes());
    file.extend(64u64.to_le_bytes());
    file.extend(0u64.to_le_bytes());
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes());
    file.extend(7u32.to_le_bytes());
    for word in [
        0,
        u64::from(ADDRESS),
        u64::from(ADDRESS),
        size,
        size,
        0x1000,
    ] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}

/// All is allowed but these two, on every architecture that the kernel runs. i386 has socketcall(2)
/// as well, which hides its arguments: a runtime has to know that it is socket(2) in another dress.
fn profile() -> Value {
    let refuse = |family: u64| {
        json!({"names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
            "args": [{"index": 0, "value": family, "op": "SCMP_CMP_EQ"}]})
    };
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [refuse(ALG), refuse(VSOCK)],
    })
}

const ALG: u64 = 38;
const VSOCK: u64 = 40;
const UNIX: u64 = 1;

fn families(stage: &Stage<'_>) -> Result<Verdict> {
    if !cfg!(target_arch = "x86_64") {
        return Ok(Verdict::Unsupported("the programs are for x86".to_owned()));
    }
    let given = stage.options.seccomp.clone();
    let which = if given.is_some() {
        "the given profile"
    } else {
        "a profile of its own"
    };
    let profile = given.unwrap_or_else(profile);
    let set = stage
        .set()?
        .script("sleep 600")
        .with("/linux/seccomp", profile);
    let mut programs = Vec::new();
    for abi in ABIS {
        for family in [ALG, VSOCK, UNIX] {
            let name = format!("{abi:?}-{family}");
            let path = set.rootfs.join("bin").join(&name);
            fs::write(&path, program(abi, u32::try_from(family)?))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
            // Without the filter: what does this kernel itself say?
            let bare = std::process::Command::new(&path).status();
            let bare = bare.ok().and_then(|status| status.code());
            programs.push((abi, family, name, bare));
        }
    }
    let started = stage.start(&set)?;
    ensure!(
        started.status.is_some_and(|s| s.success()),
        "{}",
        started.error
    );
    let mut found = None;
    let mut tried = Vec::new();
    for (abi, family, name, bare) in &programs {
        let ran = stage.call(&["exec", &set.id, &format!("/bin/{name}")])?;
        let code = ran.status.context("exec does not end")?.code();
        if *family == UNIX {
            // Shows that the filter lets a harmless one pass, so that it is the family it refuses.
            if *abi == Abi::Native && code != Some(0) {
                found.get_or_insert(format!("AF_UNIX ends with {code:?}"));
            }
            continue;
        }
        // 38 is ENOSYS: the kernel has no such ABI. 97 is EAFNOSUPPORT, the kernel's own answer.
        if code == Some(0) || (code == Some(97) && *bare == Some(97)) {
            found.get_or_insert(format!("{name}: reached the kernel, which said {code:?}"));
        }
        if bare.is_some_and(|code| code != 38) {
            tried.push(format!("{abi:?}"));
        }
    }
    stage.delete(&set.id)?;
    tried.dedup();
    Ok(match found {
        Some(what) => Verdict::Vulnerable(format!("{which}: {what}")),
        None => Verdict::Safe(format!("{which}: refused by {}", tried.join(", "))),
    })
}
