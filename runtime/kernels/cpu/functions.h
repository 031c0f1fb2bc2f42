// The functions of the compute language on vectors of 16 float32: branch-free, accurate to about 2 units in the last
// place.
//
// NaN propagates; overflow and underflow follow IEEE 754. The minimax polynomials are our own fits, with a relative
// error below 3e-8. No function comes from libm: results must not depend on the installed version of it.
#pragma once

#include <type_traits>

#include "elements.h"

namespace sage {

// A condition is a vector of 0 and -1, or a bool for scalars.

inline Floats where(Ints condition, Floats a, Floats b) { return condition ? a : b; }
inline Floats where(Ints condition, Floats a, float b) { return condition ? a : broadcast(b); }
inline Floats where(Ints condition, float a, Floats b) { return condition ? broadcast(a) : b; }
inline Floats where(Ints condition, float a, float b) { return condition ? broadcast(a) : broadcast(b); }
inline Floats where(bool condition, Floats a, float b) { return condition ? a : broadcast(b); }
inline Floats where(bool condition, float a, Floats b) { return condition ? broadcast(a) : b; }
inline int64_t where(bool condition, int64_t a, int64_t b) { return condition ? a : b; }
template <class T>
inline T where(bool condition, T a, T b) {
    return condition ? a : b;
}

inline Ints mask(bool condition) { return Ints{} - (int32_t)condition; }
inline Ints logical_not(Ints condition) { return ~condition; }
inline bool logical_not(bool condition) { return !condition; }

// NaN if either operand is NaN, as in torch.

#if defined(__AVX512F__)  // vmaxps returns the second operand if one is NaN
inline Floats maximum(Floats a, Floats b) { return a == a ? (Floats)_mm512_max_ps((__m512)a, (__m512)b) : a; }
inline Floats minimum(Floats a, Floats b) { return a == a ? (Floats)_mm512_min_ps((__m512)a, (__m512)b) : a; }
#else
inline Floats maximum(Floats a, Floats b) { return (a != a) | (a > b) ? a : b; }
inline Floats minimum(Floats a, Floats b) { return (a != a) | (a < b) ? a : b; }
#endif
inline Floats maximum(Floats a, float b) { return maximum(a, broadcast(b)); }
inline Floats maximum(float a, Floats b) { return maximum(broadcast(a), b); }
inline Floats minimum(Floats a, float b) { return minimum(a, broadcast(b)); }
inline Floats minimum(float a, Floats b) { return minimum(broadcast(a), b); }
inline float maximum(float a, float b) { return a != a || a > b ? a : b; }
inline float minimum(float a, float b) { return a != a || a < b ? a : b; }

template <class A, class B, class = std::enable_if_t<std::is_integral<A>::value && std::is_integral<B>::value>>
inline std::common_type_t<A, B> maximum(A a, B b) {
    return a > b ? a : b;
}
template <class A, class B, class = std::enable_if_t<std::is_integral<A>::value && std::is_integral<B>::value>>
inline std::common_type_t<A, B> minimum(A a, B b) {
    return a < b ? a : b;
}

inline Floats abs(Floats x) { return bits_of<Floats>(bits_of<Bits>(x) & 0x7fffffff); }
inline Ints abs(Ints x) { return x < 0 ? (Ints)(-(Bits)x) : x; }
inline Floats relu(Floats x) { return maximum(x, 0.0f); }

inline Floats sqrt(Floats x) {
    for (int lane = 0; lane < LANES; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
    return x;
}
inline Floats rsqrt(Floats x) { return 1.0f / sqrt(x); }
inline Floats floor(Floats x) {
    for (int lane = 0; lane < LANES; ++lane) x[lane] = __builtin_floorf(x[lane]);
    return x;
}
inline Floats round(Floats x) {  // ties to even
#if defined(__AVX512F__)
    return (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
    for (int lane = 0; lane < LANES; ++lane) x[lane] = __builtin_rintf(x[lane]);
    return x;
#endif
}

inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    for (int lane = 0; lane < LANES; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return c;
#endif
}

// 2^n for integral n; n must be in the exponent range of normal numbers.
inline Floats power_of_two(Ints n) { return bits_of<Floats>(((Bits)n + 127) << 23); }

// e^x = 2^n e^r with |r| <= ln(2)/2; the power of two is applied in two steps, so that subnormal results are correct.
inline Floats exp(Floats x) {
    Floats bounded = minimum(maximum(x, -104.0f), 89.0f);
    Floats n = round(bounded * 1.44269504f);
    Floats r = fma(n, broadcast(-0.693359375f), bounded);
    r = fma(n, broadcast(2.12194440e-4f), r);
    Floats p = fma(broadcast(1.985727389e-4f), r, broadcast(1.393363328e-3f));
    p = fma(p, r, broadcast(8.333362781e-3f));
    p = fma(p, r, broadcast(4.166647053e-2f));
    p = fma(p, r, broadcast(1.666666652e-1f));
    p = fma(p, r, broadcast(5.000000010e-1f));
    p = fma(p * r, r, r) + 1.0f;
#if defined(__AVX512F__)
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;
    return p * power_of_two(half) * power_of_two(whole - half);
#endif
}

// log(2^n m) = n ln(2) + log(m) with m between sqrt(1/2) and sqrt(2).
inline Floats log(Floats x) {
    Ints is_small = x < 0x1p-126f;
    Floats normal = is_small ? x * 0x1p24f : x;
    Bits bits = bits_of<Bits>(normal) + (0x3f800000 - 0x3f3504f3);
    Floats n = __builtin_convertvector((Ints)(bits >> 23) - 127, Floats) + where(is_small, -24.0f, 0.0f);
    Floats m = bits_of<Floats>((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
    Floats p = fma(broadcast(8.722243471e-2f), m, broadcast(-1.436678822e-1f));
    p = fma(p, m, broadcast(1.495228297e-1f));
    p = fma(p, m, broadcast(-1.656240193e-1f));
    p = fma(p, m, broadcast(1.995683283e-1f));
    p = fma(p, m, broadcast(-2.500207366e-1f));
    p = fma(p, m, broadcast(3.333418564e-1f));
    p = fma(p, m, broadcast(-4.999998797e-1f));
    p = fma(p * m, m, m);
    Floats result = fma(n, broadcast(0.693359375f), fma(n, broadcast(-2.12194440e-4f), p));
    result = x == 0.0f ? broadcast(-INFINITY) : result;
    result = x == INFINITY ? x : result;
    return (x < 0.0f) | (x != x) ? broadcast(NAN) : result;
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exp(-x)); }

// An odd polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel.
inline Floats tanh(Floats x) {
    Floats z = x * x, size = abs(x);
    Floats p = fma(broadcast(-5.468263765e-3f), z, broadcast(2.041518889e-2f));
    p = fma(p, z, broadcast(-5.366527884e-2f));
    p = fma(p, z, broadcast(1.333041512e-1f));
    p = fma(p, z, broadcast(-3.333322927e-1f));
    Floats small = fma(p * z, x, x);
    Floats large = 1.0f - 2.0f / (exp(2.0f * size) + 1.0f);
    return size < 0.65f ? small : (x < 0.0f ? -large : large);
}

// An odd polynomial below 1; above, 1 - e^q(x), where q is a polynomial that approximates log(1 - erf(x)).
inline Floats erf(Floats x) {
    Floats z = x * x, size = minimum(abs(x), 4.0f);
    Floats p = fma(broadcast(-9.641516066e-6f), z, broadcast(1.125694789e-4f));
    p = fma(p, z, broadcast(-8.482828841e-4f));
    p = fma(p, z, broadcast(5.220945432e-3f));
    p = fma(p, z, broadcast(-2.686540004e-2f));
    p = fma(p, z, broadcast(1.128378197e-1f));
    p = fma(p, z, broadcast(-3.761263843e-1f));
    p = fma(p, z, broadcast(1.128379167f));
    Floats q = fma(broadcast(-4.887610185e-8f), size, broadcast(2.711333135e-6f));
    q = fma(q, size, broadcast(-5.628901608e-5f));
    q = fma(q, size, broadcast(6.521280175e-4f));
    q = fma(q, size, broadcast(-4.946411936e-3f));
    q = fma(q, size, broadcast(2.682895674e-2f));
    q = fma(q, size, broadcast(-1.106546968e-1f));
    q = fma(q, size, broadcast(-6.313227913e-1f));
    q = fma(q, size, broadcast(-1.130481853f));
    q = fma(q, size, broadcast(3.727835963e-4f));
    Floats large = 1.0f - exp(q);
    return size < 1.0f ? p * x : (x < 0.0f ? -large : large);
}

inline Floats pow(Floats x, float exponent) {
    for (int lane = 0; lane < LANES; ++lane) x[lane] = __builtin_powf(x[lane], exponent);
    return x;
}

// Scalar overloads call the vector functions, so that a value has the same bits wherever it is computed.

#define SAGE_SCALAR(name) \
    inline float name(float x) { return name(broadcast(x))[0]; }
SAGE_SCALAR(abs)
SAGE_SCALAR(relu)
SAGE_SCALAR(floor)
SAGE_SCALAR(round)
SAGE_SCALAR(exp)
SAGE_SCALAR(log)
SAGE_SCALAR(sigmoid)
SAGE_SCALAR(tanh)
SAGE_SCALAR(erf)
#undef SAGE_SCALAR
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float pow(float x, float exponent) { return __builtin_powf(x, exponent); }

}  // namespace sage
