/* LD_PRELOAD: after crash_begin(root, log), one line in `log` for each call of this process, from whatever language, that
 * changes files below `root`. Waiting for the disk (fsync) changes nothing. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static int log_fd = -1;
static ssize_t (*plain_write)(int, const void *, size_t);

void crash_begin(const char *below, const char *log) {
    plain_write = dlsym(RTLD_NEXT, "write");
    log_fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0644);
    snprintf(root, sizeof root, "%s", below);
}

static void note(const char *name, const char *path) {
    char line[2 * PATH_MAX];
    size_t n = strlen(root);
    if (log_fd < 0 || strncmp(path, root, n) || (path[n] && path[n] != '/')) return;
    int size = snprintf(line, sizeof line, "%s %s\n", name, path);
    plain_write(log_fd, line, (size_t)size);
}

static void note_fd(const char *name, int fd) {
    char link[64], path[PATH_MAX];
    if (log_fd < 0) return;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n > 0) path[n] = 0, note(name, path);
}

static void note_at(const char *name, int folder, const char *path) {
    char link[64], full[2 * PATH_MAX];
    if (log_fd < 0 || path[0] == '/' || folder == AT_FDCWD) {
        note(name, path);
        return;
    }
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = readlink(link, full, PATH_MAX - 1);
    if (n > 0) snprintf(full + n, sizeof full - (size_t)n, "/%s", path), note(name, full);
}

#define PLAIN(f) __typeof__(&f) plain = (__typeof__(&f))dlsym(RTLD_NEXT, #f)
#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); }
#define OPEN(f) int f(const char *p, int flags, ...) { PLAIN(f); MODE(flags) if (flags & (O_CREAT | O_TRUNC)) note("open", p); return plain(p, flags, mode); }
#define OPENAT(f) int f(int d, const char *p, int flags, ...) { PLAIN(f); MODE(flags) if (flags & (O_CREAT | O_TRUNC)) note_at("open", d, p); return plain(d, p, flags, mode); }
#define FOPEN(f) FILE *f(const char *p, const char *m) { PLAIN(f); if (strpbrk(m, "wa+")) note("fopen", p); return plain(p, m); }
#define PWRITE(f) ssize_t f(int d, const void *b, size_t n, off_t o) { PLAIN(f); note_fd("pwrite", d); return plain(d, b, n, o); }
#define PWRITEV(f) ssize_t f(int d, const struct iovec *v, int n, off_t o) { PLAIN(f); note_fd("pwritev", d); return plain(d, v, n, o); }
#define FTRUNCATE(f) int f(int d, off_t n) { PLAIN(f); note_fd("ftruncate", d); return plain(d, n); }
#define TRUNCATE(f) int f(const char *p, off_t n) { PLAIN(f); note("truncate", p); return plain(p, n); }
#define FALLOCATE(f) int f(int d, off_t o, off_t n) { PLAIN(f); note_fd("posix_fallocate", d); return plain(d, o, n); }
#define MMAP(f) void *f(void *a, size_t n, int p, int s, int d, off_t o) { PLAIN(f); if (d >= 0 && (s & MAP_SHARED) && (p & PROT_WRITE)) note_fd("mmap", d); return plain(a, n, p, s, d, o); }

OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64) FOPEN(fopen) FOPEN(fopen64)
PWRITE(pwrite) PWRITE(pwrite64) PWRITEV(pwritev) PWRITEV(pwritev64)
FTRUNCATE(ftruncate) FTRUNCATE(ftruncate64) TRUNCATE(truncate) TRUNCATE(truncate64)
FALLOCATE(posix_fallocate) FALLOCATE(posix_fallocate64) MMAP(mmap) MMAP(mmap64)

ssize_t write(int d, const void *b, size_t n) { PLAIN(write); note_fd("write", d); return plain(d, b, n); }
ssize_t writev(int d, const struct iovec *v, int n) { PLAIN(writev); note_fd("writev", d); return plain(d, v, n); }
ssize_t copy_file_range(int i, off64_t *io, int d, off64_t *o, size_t n, unsigned f) { PLAIN(copy_file_range); note_fd("copy_file_range", d); return plain(i, io, d, o, n, f); }
int rename(const char *a, const char *b) { PLAIN(rename); note("replace", b); return plain(a, b); }
int renameat(int d, const char *a, int e, const char *b) { PLAIN(renameat); note_at("replace", e, b); return plain(d, a, e, b); }
int unlink(const char *p) { PLAIN(unlink); note("unlink", p); return plain(p); }
int rmdir(const char *p) { PLAIN(rmdir); note("rmdir", p); return plain(p); }
int unlinkat(int d, const char *p, int f) { PLAIN(unlinkat); note_at(f & AT_REMOVEDIR ? "rmdir" : "unlink", d, p); return plain(d, p, f); }
int mkdir(const char *p, mode_t m) { PLAIN(mkdir); note("mkdir", p); return plain(p, m); }
int mkdirat(int d, const char *p, mode_t m) { PLAIN(mkdirat); note_at("mkdir", d, p); return plain(d, p, m); }
int link(const char *a, const char *b) { PLAIN(link); note("link", b); return plain(a, b); }
int linkat(int d, const char *a, int e, const char *b, int f) { PLAIN(linkat); note_at("link", e, b); return plain(d, a, e, b, f); }
int symlink(const char *a, const char *b) { PLAIN(symlink); note("symlink", b); return plain(a, b); }
