// Copies rows of KV between paged pools, or between a pool and a socket, and computes their digest in the same pass.
//
// A digest of 64 bits over the words w of a piece, in lines of 8 words, one for each of 8 lanes:
//
//     lane = rotate(lane, 27) + w * K1      per word: any change of one word changes the lane
//     lane = (lane ^ lane >> 29) * K2       after every 16 lines, so that no two positions are alike
//
// Rows that are no whole number of lines are padded with zeros. The digest does not depend on blocks, only on the rows.
#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LINE = 64;
constexpr int64_t LINES_PER_ROUND = 16;
constexpr uint64_t K1 = 0x9e3779b185ebca87, K2 = 0xc2b2ae3d27d4eb4f;
constexpr int64_t STREAMED = 1 << 17;  // copies of more bytes bypass the caches

typedef uint64_t Words __attribute__((vector_size(LINE)));

inline Words load(const uint8_t* from) {
    Words words;
    memcpy(&words, from, LINE);
    return words;
}

inline void store(uint8_t* to, Words words) { memcpy(to, &words, LINE); }

inline void store_past_caches(uint8_t* to, Words words) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)to, (__m512i)words);
#else
    store(to, words);
#endif
}

inline uint64_t rotate(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

class Digest {
  public:
    explicit Digest(uint64_t seed) : lanes_{seed, K1, K2, ~seed, K1 ^ K2, seed + K1, seed + K2, K1 + K2} {}

    inline void add(Words words) {
        lanes_ = (lanes_ << 27 | lanes_ >> 37) + words * K1;
        if (++lines_ % LINES_PER_ROUND == 0) lanes_ = (lanes_ ^ lanes_ >> 29) * K2;
    }

    uint64_t value() const {
        uint64_t found = lines_;
        for (int lane = 0; lane < 8; ++lane) found = rotate((found ^ lanes_[lane]) * K2, 31) * K1;
        return found ^ found >> 32;
    }

  private:
    Words lanes_;
    int64_t lines_ = 0;
};

inline Words load_padded(const uint8_t* from, int64_t size) {
    Words words{};
    memcpy(&words, from, size);
    return words;
}

// Adds a run of memory, and copies it if `to` is not null.
template <class Store>
void add_run(Digest& digest, const uint8_t* from, uint8_t* to, int64_t size, Store store_line) {
    Digest local = digest;  // in registers
    for (; size >= LINE; size -= LINE, from += LINE) {
        const Words words = load(from);
        if (to) {
            store_line(to, words);
            to += LINE;
        }
        local.add(words);
    }
    if (size) {
        local.add(load_padded(from, size));
        if (to) memcpy(to, from, size);
    }
    digest = local;
}

}  // namespace

// Rows of tokens in the blocks of one cache. Token t of the span is token `first + t` of its blocks.
struct Rows {
    uint8_t* base;  // the first byte of the wanted heads in block 0
    int64_t block_bytes, row_stride, row_bytes, block_size, first;
    const int64_t* blocks;
    int64_t num_blocks;

    uint8_t* at(int64_t token) const {
        const int64_t place = first + token;
        return base + blocks[place / block_size] * block_bytes + place % block_size * row_stride;
    }

    // How many rows from this one on follow each other in memory without gaps.
    int64_t run(int64_t token) const {
        if (row_stride != row_bytes) return 1;
        const int64_t place = first + token;
        int64_t block = place / block_size, found = block_size - place % block_size;
        if (block_bytes != block_size * row_stride) return found;
        for (; block + 1 < num_blocks && blocks[block + 1] == blocks[block] + 1; ++block) found += block_size;
        return found;
    }
};

namespace {

// What one system call sends or receives: parts of rows, each in its place or, if it is short, in a buffer between.
class Batch {
  public:
    static constexpr int64_t BYTES = 1 << 17;   // in the second-level cache from the digest to the socket, and back
    static constexpr int64_t DIRECT = 1 << 11;  // shorter parts cost more as an entry of the vector than to copy

    Batch() : buffer_(BYTES) { parts_.reserve(BYTES / LINE); }

    void clear() {
        parts_.clear();
        vector_.clear();
        bytes_ = buffered_ = 0;
    }

    // Adds the beginning of a run: whole lines, or all of it. Returns its size, 0 if the batch is full.
    int64_t add(uint8_t* place, int64_t size) {
        const int64_t room = (BYTES - bytes_) / LINE * LINE;
        if (size > room) size = room;
        if (size <= 0) return 0;
        uint8_t* buffered = nullptr;
        if (size < DIRECT) {
            buffered = buffer_.data() + buffered_;
            buffered_ += size;
        }
        parts_.push_back({place, buffered, size});
        extend(buffered ? buffered : place, size);
        bytes_ += size;
        return size;
    }

    // Sends the batch. Returns 0 or the number of an error.
    int send(int socket, Digest& digest) {
        for (const Part& part : parts_) add_run(digest, part.place, part.buffered, part.size, store);
        return transfer([&](msghdr& message) { return sendmsg(socket, &message, MSG_NOSIGNAL); });
    }

    // Receives the batch. Returns 0 or the number of an error.
    int receive(int socket, Digest& digest) {
        if (int error = transfer([&](msghdr& message) { return recvmsg(socket, &message, MSG_WAITALL); })) return error;
        for (const Part& part : parts_)
            if (part.buffered)
                add_run(digest, part.buffered, part.place, part.size, store);
            else
                add_run(digest, part.place, nullptr, part.size, store);
        return 0;
    }

  private:
    struct Part {
        uint8_t *place, *buffered;
        int64_t size;
    };

    void extend(uint8_t* from, int64_t size) {
        if (!vector_.empty() && (uint8_t*)vector_.back().iov_base + vector_.back().iov_len == from)
            vector_.back().iov_len += size;
        else
            vector_.push_back({from, (size_t)size});
    }

    // Calls `call` until all bytes of the vector have passed.
    template <class Call>
    int transfer(Call call) {
        size_t first = 0;
        while (first < vector_.size()) {
            msghdr message{};
            message.msg_iov = &vector_[first];
            message.msg_iovlen = vector_.size() - first;
            ssize_t passed = call(message);
            if (passed < 0 && errno == EINTR) continue;
            if (passed <= 0) return passed < 0 ? errno : ECONNRESET;  // 0: the other end has closed the connection
            for (; first < vector_.size() && (size_t)passed >= vector_[first].iov_len; ++first)
                passed -= vector_[first].iov_len;
            if (passed) {
                vector_[first].iov_base = (uint8_t*)vector_[first].iov_base + passed;
                vector_[first].iov_len -= passed;
            }
        }
        return 0;
    }

    std::vector<uint8_t> buffer_;
    std::vector<Part> parts_;
    std::vector<iovec> vector_;  // at most two entries per DIRECT bytes, which is fewer than IOV_MAX
    int64_t bytes_ = 0, buffered_ = 0;
};

// Calls `pass` for batches with all rows of a cache, in order. Returns 0 or the first error.
template <class Pass>
int pass_rows(const Rows& rows, int64_t num_tokens, Batch& batch, Pass pass) {
    batch.clear();
    for (int64_t token = 0; token < num_tokens;) {
        int64_t count = rows.row_bytes % LINE ? 1 : rows.run(token);  // a digest pads each row
        if (count > num_tokens - token) count = num_tokens - token;
        uint8_t* place = rows.at(token);
        for (int64_t left = count * rows.row_bytes; left;) {
            const int64_t added = batch.add(place, left);
            if (!added) {
                if (int error = pass()) return error;
                batch.clear();
            }
            place += added;
            left -= added;
        }
        token += count;
    }
    return pass();
}

}  // namespace

#define SAGE_EXPORT extern "C" __attribute__((visibility("default")))

// The digest of the rows of `source`, which are copied to `target` unless that is null.
SAGE_EXPORT uint64_t sage_copy_rows(const Rows* source, const Rows* target, int64_t num_tokens, uint64_t seed) {
    Digest digest(seed);
    const int64_t row_bytes = source->row_bytes;
    const bool is_streamed = target && num_tokens * row_bytes > STREAMED;
    for (int64_t token = 0; token < num_tokens;) {
        int64_t count = source->run(token);
        if (target) count = count < target->run(token) ? count : target->run(token);
        if (count > num_tokens - token) count = num_tokens - token;
        if (row_bytes % LINE) count = 1;  // each row is padded
        uint8_t* to = target ? target->at(token) : nullptr;
        const uint8_t* from = source->at(token);
        if (is_streamed && (uintptr_t)to % LINE == 0 && row_bytes % LINE == 0)
            add_run(digest, from, to, count * row_bytes, store_past_caches);
        else
            add_run(digest, from, to, count * row_bytes, store);
        token += count;
    }
#if defined(__AVX512F__)
    _mm_sfence();
#endif
    return digest.value();
}

// Sends `num_rows` caches' rows of the same tokens, one after the other. The digest of each begins with that of the one
// before it, the first one with `*digest`, which becomes that of the last one. Returns 0 or the number of an error.
SAGE_EXPORT int sage_send_rows(int socket, const Rows* rows, int64_t num_rows, int64_t num_tokens, uint64_t* digest) {
    Batch batch;
    for (int64_t i = 0; i < num_rows; ++i) {
        Digest own(*digest);
        if (int error = pass_rows(rows[i], num_tokens, batch, [&] { return batch.send(socket, own); })) return error;
        *digest = own.value();
    }
    return 0;
}

// The other end of `sage_send_rows`: writes what arrives to the rows.
SAGE_EXPORT int sage_receive_rows(int socket, const Rows* rows, int64_t num_rows, int64_t num_tokens,
                                  uint64_t* digest) {
    Batch batch;
    for (int64_t i = 0; i < num_rows; ++i) {
        Digest own(*digest);
        if (int error = pass_rows(rows[i], num_tokens, batch, [&] { return batch.receive(socket, own); })) return error;
        *digest = own.value();
    }
    return 0;
}
