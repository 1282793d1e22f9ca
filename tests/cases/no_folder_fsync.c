/* A file system that cannot sync folders: fsync of one answers EINVAL, as some FUSE file systems do. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

int fsync(int fd) {
    struct stat info;
    if (!fstat(fd, &info) && S_ISDIR(info.st_mode)) {
        errno = EINVAL;
        return -1;
    }
    return syscall(SYS_fsync, fd);
}
