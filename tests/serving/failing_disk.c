/* A disk that fails: calls of the C library on paths below one folder, from the Nth on, as a shared file says. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, SYNC = 2, TRUNCATE = 4, RENAME = 8, UNLINK = 16, OPEN = 32, READ = 64 };

struct control {
    int64_t operations; /* that fail, as bits; 0 is a disk that is well */
    int64_t error;      /* errno; 0 is a write of half of what it was given */
    int64_t after;      /* calls of these that are well before */
    int64_t count;      /* calls that fail then */
    int64_t calls;      /* of these so far */
    int64_t failures;
};

static struct control *control;
static char folder[PATH_MAX];
static size_t length;

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("FAILING_DISK_CONTROL"), *below = getenv("FAILING_DISK_FOLDER");
    if (path == NULL || below == NULL || realpath(below, folder) == NULL)
        return;
    length = strlen(folder);
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    int descriptor = real(path, O_RDWR | O_CLOEXEC);
    void *found = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    close(descriptor);
    control = found == MAP_FAILED ? NULL : found;
}

static int fails(int operation)
{
    if (__atomic_fetch_add(&control->calls, 1, __ATOMIC_SEQ_CST) < control->after)
        return 0;
    if (__atomic_fetch_add(&control->failures, 1, __ATOMIC_SEQ_CST) >= control->count)
        return 0;
    return 1;
}

static int is_armed(int operation) { return control != NULL && (control->operations & operation); }

static int is_below(const char *path)
{
    return strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static int at_descriptor(int operation, int descriptor)
{
    char link[64], path[PATH_MAX];
    if (!is_armed(operation))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0)
        return 0;
    path[size] = 0;
    return is_below(path) && fails(operation);
}

static int at_path(int operation, const char *path)
{
    return is_armed(operation) && is_below(path) && fails(operation);
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (real == NULL) \
        real = dlsym(RTLD_NEXT, #name)
#define REFUSE \
    do { \
        errno = (int)control->error; \
        return -1; \
    } while (0)
#define HALF(size) ((size) > 1 ? (size) / 2 : (size))

ssize_t write(int descriptor, const void *data, size_t size)
{
    REAL(write);
    if (at_descriptor(WRITE, descriptor)) {
        if (control->error)
            REFUSE;
        size = HALF(size);
    }
    return real(descriptor, data, size);
}

#define PWRITE(name, offset_type) \
    ssize_t name(int descriptor, const void *data, size_t size, offset_type offset) \
    { \
        REAL(name); \
        if (at_descriptor(WRITE, descriptor)) { \
            if (control->error) \
                REFUSE; \
            size = HALF(size); \
        } \
        return real(descriptor, data, size, offset); \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int descriptor, const struct iovec *pieces, int count)
{
    REAL(writev);
    if (at_descriptor(WRITE, descriptor)) {
        if (control->error)
            REFUSE;
        count = HALF(count);
    }
    return real(descriptor, pieces, count);
}

#define OF_DESCRIPTOR(name, operation) \
    int name(int descriptor) \
    { \
        REAL(name); \
        if (at_descriptor(operation, descriptor) && control->error) \
            REFUSE; \
        return real(descriptor); \
    }
OF_DESCRIPTOR(fsync, SYNC)
OF_DESCRIPTOR(fdatasync, SYNC)

#define FTRUNCATE(name, offset_type) \
    int name(int descriptor, offset_type size) \
    { \
        REAL(name); \
        if (at_descriptor(TRUNCATE, descriptor) && control->error) \
            REFUSE; \
        return real(descriptor, size); \
    }
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)

ssize_t read(int descriptor, void *data, size_t size)
{
    REAL(read);
    if (at_descriptor(READ, descriptor) && control->error)
        REFUSE;
    return real(descriptor, data, size);
}

#define PREAD(name, offset_type) \
    ssize_t name(int descriptor, void *data, size_t size, offset_type offset) \
    { \
        REAL(name); \
        if (at_descriptor(READ, descriptor) && control->error) \
            REFUSE; \
        return real(descriptor, data, size, offset); \
    }
PREAD(pread, off_t)
PREAD(pread64, off64_t)

int rename(const char *old, const char *new)
{
    REAL(rename);
    if (at_path(RENAME, new) && control->error)
        REFUSE;
    return real(old, new);
}

int renameat(int from, const char *old, int to, const char *new)
{
    REAL(renameat);
    if (at_path(RENAME, new) && control->error)
        REFUSE;
    return real(from, old, to, new);
}

int unlink(const char *path)
{
    REAL(unlink);
    if (at_path(UNLINK, path) && control->error)
        REFUSE;
    return real(path);
}

int unlinkat(int at, const char *path, int flags)
{
    REAL(unlinkat);
    if (at_path(UNLINK, path) && control->error)
        REFUSE;
    return real(at, path, flags);
}

#define OPEN_CALL(name) \
    int name(const char *path, int flags, ...) \
    { \
        REAL(name); \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        if (at_path(OPEN, path) && control->error) \
            REFUSE; \
        return real(path, flags, mode); \
    }
OPEN_CALL(open)
OPEN_CALL(open64)

#define OPENAT_CALL(name) \
    int name(int at, const char *path, int flags, ...) \
    { \
        REAL(name); \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        if (at_path(OPEN, path) && control->error) \
            REFUSE; \
        return real(at, path, flags, mode); \
    }
OPENAT_CALL(openat)
OPENAT_CALL(openat64)
