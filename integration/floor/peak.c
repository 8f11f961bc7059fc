/*
 * What a command used: peak resident memory and CPU time of it and of the children that it waited
 * for. Small on purpose: a child's peak begins with the size of the program that forked it.
 * Usage: peak PROGRAM [ARGS...]; prints "KIB MICROSECONDS" on stdout, exits as the program does.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static long micros(struct timeval time)
{
    return time.tv_sec * 1000000L + time.tv_usec;
}

int main(int argc, char **argv)
{
    struct rusage used;
    int status, null;
    pid_t pid;

    if (argc < 2) {
        fputs("usage: peak PROGRAM [ARGS...]\n", stderr);
        return 2;
    }
    pid = fork();
    if (pid < 0) {
        perror("fork");
        return 1;
    }
    if (pid == 0) {
        null = open("/dev/null", O_RDWR);
        dup2(null, 1);
        execv(argv[1], argv + 1);
        perror(argv[1]);
        _exit(127);
    }
    if (wait4(pid, &status, 0, &used) < 0) {
        perror("wait4");
        return 1;
    }
    printf("%ld %ld\n", used.ru_maxrss, micros(used.ru_utime) + micros(used.ru_stime));
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
