//! The first instructions of `coracle`, before the C library's.
//!
//! The commands that enter a container execute the binary again through a read-only mount of it
//! (CVE-2019-5736; see `runtime/src/sealed.rs`, which does the same more slowly wherever this does not).
//! Done here, the first of the two executions costs 0.15 ms and not 0.55: a static glibc asks for
//! dozens of CPUID leaves while it starts, each of which leaves a virtual machine.
//!
//! ```text
//! kernel -> coracle_start --argv has run, create or exec, and the file is not on a read-only mount-->
//!               |             open_tree(CLONE), mount_setattr(RDONLY), execveat: does not return
//!               +--anything else, and every failure--> _start, with the stack as the kernel left it
//! ```
//!
//! Assembly, because nothing that a compiler relies on is there yet: no thread-local storage, and no
//! memcpy, whose address the C library has still to choose.

#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    ".pushsection .rodata.coracle_start, \"a\", @progbits",
    "10: .asciz \"/proc/self/exe\"",
    "11: .byte 0",
    ".balign 8",
    // struct mount_attr: set MOUNT_ATTR_RDONLY, clear nothing, MS_PRIVATE, no user namespace
    "12: .quad 1, 0, 0x40000, 0",
    ".popsection",
    ".pushsection .text.coracle_start, \"ax\", @progbits",
    ".globl coracle_start",
    ".type coracle_start, @function",
    "coracle_start:",
    "    mov r12, rsp",
    "    mov r13, [r12]",
    "    lea r14, [r12 + 8]",
    // Every word but the program's name. Four bytes of any word can be read: the strings are
    // followed by the environment, the file name and eight zero bytes.
    "    xor ebx, ebx",
    "2:  inc rbx",
    "    cmp rbx, r13",
    "    jae 9f",
    "    mov rsi, [r14 + rbx * 8]",
    "    mov eax, [rsi]",
    "    cmp eax, 0x006e7572", // "run\0"
    "    je 3f",
    "    cmp eax, 0x63657865", // "exec"
    "    jne 4f",
    "    cmp byte ptr [rsi + 4], 0",
    "    je 3f",
    "4:  cmp eax, 0x61657263", // "crea"
    "    jne 2b",
    "    cmp word ptr [rsi + 4], 0x6574", // "te"
    "    jne 2b",
    "    cmp byte ptr [rsi + 6], 0",
    "    jne 2b",
    // open("/proc/self/exe", O_RDONLY | O_CLOEXEC), fstatfs, close
    "3:  mov eax, 2",
    "    lea rdi, [rip + 10b]",
    "    mov esi, 0x80000",
    "    xor edx, edx",
    "    syscall",
    "    test eax, eax",
    "    js 9f",
    "    mov r15d, eax",
    "    and rsp, -16",
    "    sub rsp, 128",
    "    mov eax, 138",
    "    mov edi, r15d",
    "    mov rsi, rsp",
    "    syscall",
    "    mov ebx, eax",
    "    mov eax, 3",
    "    mov edi, r15d",
    "    syscall",
    "    test ebx, ebx",
    "    js 9f",
    // f_flags & ST_RDONLY: sealed already
    "    test byte ptr [rsp + 80], 1",
    "    jnz 9f",
    // open_tree(AT_FDCWD, "/proc/self/exe", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC)
    "    mov eax, 428",
    "    mov rdi, -100",
    "    lea rsi, [rip + 10b]",
    "    mov edx, 0x80001",
    "    syscall",
    "    test eax, eax",
    "    js 9f",
    "    mov r15d, eax",
    // mount_setattr(fd, "", AT_EMPTY_PATH, attr, 32)
    "    mov eax, 442",
    "    mov edi, r15d",
    "    lea rsi, [rip + 11b]",
    "    mov edx, 0x1000",
    "    lea r10, [rip + 12b]",
    "    mov r8d, 32",
    "    syscall",
    "    test eax, eax",
    "    js 8f",
    // execveat(fd, "", argv, envp, AT_EMPTY_PATH)
    "    mov eax, 322",
    "    mov edi, r15d",
    "    lea rsi, [rip + 11b]",
    "    mov rdx, r14",
    "    lea r10, [r14 + r13 * 8 + 8]",
    "    mov r8d, 0x1000",
    "    syscall",
    "8:  mov eax, 3",
    "    mov edi, r15d",
    "    syscall",
    // As the kernel starts a program: the stack untouched, no function to register in rdx.
    "9:  mov rsp, r12",
    "    xor edx, edx",
    "    jmp _start",
    ".size coracle_start, . - coracle_start",
    ".popsection",
);

/// Names this module, so that the linker finds the entry point in it.
pub fn linked() {}
