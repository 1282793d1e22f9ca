/* A file system without locks: flock answers ENOSYS, as on Lustre without -o flock. */
#include <errno.h>

int flock(int fd, int operation) {
    (void)fd;
    (void)operation;
    errno = ENOSYS;
    return -1;
}
