// Copies rows of KV between paged pools and computes their digest, both in one pass over the memory.
//
// A digest of 64 bits over the words w of a piece, in lines of 8 words, one for each of 8 lanes:
//
//     lane = rotate(lane, 27) + w * K1      per word: any change of one word changes the lane
//     lane = (lane ^ lane >> 29) * K2       after every 16 lines, so that no two positions are alike
//
// Rows that are no whole number of lines are padded with zeros. The digest does not depend on blocks, only on the rows.
#include <cstdint>
#include <cstring>

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
    int64_t block_bytes, row_stride, block_size, first;
    const int64_t* blocks;
    int64_t num_blocks;

    uint8_t* at(int64_t token) const {
        const int64_t place = first + token;
        return base + blocks[place / block_size] * block_bytes + place % block_size * row_stride;
    }

    // How many rows from this one on follow each other in memory without gaps.
    int64_t run(int64_t token, int64_t row_bytes) const {
        if (row_stride != row_bytes) return 1;
        const int64_t place = first + token;
        int64_t block = place / block_size, found = block_size - place % block_size;
        if (block_bytes != block_size * row_stride) return found;
        for (; block + 1 < num_blocks && blocks[block + 1] == blocks[block] + 1; ++block) found += block_size;
        return found;
    }
};

#define SAGE_EXPORT extern "C" __attribute__((visibility("default")))

// The digest of the rows of `source`, which are copied to `target` unless that is null.
SAGE_EXPORT uint64_t sage_copy_rows(const Rows* source, const Rows* target, int64_t num_tokens, int64_t row_bytes,
                                    uint64_t seed) {
    Digest digest(seed);
    const bool is_streamed = target && num_tokens * row_bytes > STREAMED;
    for (int64_t token = 0; token < num_tokens;) {
        int64_t count = source->run(token, row_bytes);
        if (target) count = count < target->run(token, row_bytes) ? count : target->run(token, row_bytes);
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
