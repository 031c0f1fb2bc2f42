// Messages between two ranks of one host, through memory that they share (point_to_point.cpp).
//
// A link is a ring buffer in each direction between this process and one peer. Messages arrive in the order in which
// they were sent, and sender and receiver must agree on their sizes. A message may be larger than the ring.
#pragma once

#include "kernel.h"

// Each returns null, or an error message. A message is begun with its total size, and passed in any number of pieces,
// which need not be the same on both sides. `peer` is the rank within the group.
extern "C" const char* sage_begin_send(int64_t group, int64_t peer, int64_t bytes);
extern "C" const char* sage_send_piece(int64_t group, int64_t peer, const void* data, int64_t bytes);
extern "C" const char* sage_begin_receive(int64_t group, int64_t peer, int64_t bytes);
extern "C" const char* sage_receive_piece(int64_t group, int64_t peer, void* data, int64_t bytes);

namespace sage {

// Sends rows of `width` elements to a peer as one message.
template <class E>
inline void send_rows(const E* x, int64_t stride, int64_t rows, int64_t width, int64_t group, int64_t peer) {
    const int64_t bytes = width * (int64_t)sizeof(E);
    if (const char* error = sage_begin_send(group, peer, rows * bytes)) throw Error{error, peer};
    const int64_t num_pieces = stride == width ? 1 : rows;
    for (int64_t row = 0; row < num_pieces; ++row)
        if (const char* error = sage_send_piece(group, peer, x + row * stride, rows / num_pieces * bytes))
            throw Error{error, peer};
}

// Receives the rows of a message from a peer.
template <class E>
inline void receive_rows(E* y, int64_t stride, int64_t rows, int64_t width, int64_t group, int64_t peer) {
    const int64_t bytes = width * (int64_t)sizeof(E);
    if (const char* error = sage_begin_receive(group, peer, rows * bytes)) throw Error{error, peer};
    const int64_t num_pieces = stride == width ? 1 : rows;
    for (int64_t row = 0; row < num_pieces; ++row)
        if (const char* error = sage_receive_piece(group, peer, y + row * stride, rows / num_pieces * bytes))
            throw Error{error, peer};
}

}  // namespace sage
