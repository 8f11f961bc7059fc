/*
 * The floor under `run`: what the kernel alone takes for a container like the benchmark's.
 *
 * One clone into five namespaces, the mounts that `runc spec` asks for, the default devices,
 * pivot_root, exec, wait. No config, no cgroup, no capabilities, no state, no error texts: it is a
 * measure, not a runtime. Usage: floor ROOTFS PROGRAM [ARGS...]
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <unistd.h>

static void must(int failed, const char *what)
{
    if (failed) {
        perror(what);
        _exit(1);
    }
}

static void node(const char *path, unsigned major_number, unsigned minor_number)
{
    must(mknod(path, S_IFCHR | 0666, makedev(major_number, minor_number)), path);
}

static void fill_dev(void)
{
    node("dev/null", 1, 3);
    node("dev/zero", 1, 5);
    node("dev/full", 1, 7);
    node("dev/tty", 5, 0);
    node("dev/random", 1, 8);
    node("dev/urandom", 1, 9);
    must(symlink("/proc/self/fd", "dev/fd"), "dev/fd");
    must(symlink("/proc/self/fd/0", "dev/stdin"), "dev/stdin");
    must(symlink("/proc/self/fd/1", "dev/stdout"), "dev/stdout");
    must(symlink("/proc/self/fd/2", "dev/stderr"), "dev/stderr");
    must(symlink("pts/ptmx", "dev/ptmx"), "dev/ptmx");
}

static void child(char **argv)
{
    const unsigned long strict = MS_NOSUID | MS_NOEXEC | MS_NODEV;
    umask(0);
    must(mount(NULL, "/", NULL, MS_SLAVE | MS_REC, NULL), "slave");
    must(mount(argv[1], argv[1], NULL, MS_BIND | MS_REC, NULL), "bind");
    must(chdir(argv[1]), "chdir");
    must(mount("proc", "proc", "proc", 0, NULL), "proc");
    must(mount("tmpfs", "dev", "tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536k"), "dev");
    must(mkdir("dev/pts", 0755) || mkdir("dev/shm", 0755) || mkdir("dev/mqueue", 0755), "mkdir");
    must(mount("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC,
               "newinstance,ptmxmode=0666,mode=0620,gid=5"), "devpts");
    must(mount("shm", "dev/shm", "tmpfs", strict, "mode=1777,size=65536k"), "shm");
    must(mount("mqueue", "dev/mqueue", "mqueue", strict, NULL), "mqueue");
    must(mount("sysfs", "sys", "sysfs", strict | MS_RDONLY, NULL), "sysfs");
    fill_dev();
    must(syscall(SYS_pivot_root, ".", "."), "pivot_root");
    must(umount2(".", MNT_DETACH), "umount");
    must(chdir("/"), "chdir /");
    execv(argv[2], argv + 2);
    must(1, argv[2]);
}

int main(int argc, char **argv)
{
    int status;
    long pid;

    if (argc < 3) {
        fputs("usage: floor ROOTFS PROGRAM [ARGS...]\n", stderr);
        return 2;
    }
    pid = syscall(SYS_clone,
                  CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | SIGCHLD,
                  NULL, NULL, NULL, NULL);
    must(pid < 0, "clone");
    if (pid == 0)
        child(argv);
    must(waitpid((pid_t)pid, &status, 0) < 0, "waitpid");
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
