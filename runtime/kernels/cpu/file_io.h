// Reads of files into memory.
#pragma once

#include <errno.h>
#include <stdint.h>
#include <unistd.h>

#include "error.h"

namespace sage {

// Reads `size` bytes of an open file from `offset` on. Throws an Error if the file ends before, or cannot be read.
inline void read_file(int64_t file, void* target, int64_t size, int64_t offset) {
    char* at = (char*)target;
    while (size > 0) {
        const ssize_t count = pread((int)file, at, (size_t)size, (off_t)offset);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) throw Error{"the file cannot be read (errno %lld)", errno};
        if (count == 0) throw Error{"the file ends after %lld bytes", (long long)offset};
        at += count, offset += count, size -= count;
    }
}

}  // namespace sage
