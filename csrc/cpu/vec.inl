// Vectors of kVectorBytes in the compiler's vector types: the words of the formula for any
// instruction set.
//
// Included inside an unnamed namespace after kVectorBytes, and followed by the definition of what
// is only declared here: each unit says that in its own instructions, because compilers make worse
// code of anything that could be written here.

using Floats [[gnu::vector_size(kVectorBytes)]] = float;
using Doubles [[gnu::vector_size(kVectorBytes)]] = double;
using FloatBits [[gnu::vector_size(kVectorBytes)]] = std::uint32_t;
using FloatInts [[gnu::vector_size(kVectorBytes)]] = std::int32_t;
using Words [[gnu::vector_size(kVectorBytes / 2)]] = std::uint16_t;  // as many as Floats
using SignedWords [[gnu::vector_size(kVectorBytes / 2)]] = std::int16_t;
using Bytes [[gnu::vector_size(kVectorBytes / 4)]] = std::uint8_t;
using SignedBytes [[gnu::vector_size(kVectorBytes / 4)]] = std::int8_t;
using TwoWords [[gnu::vector_size(kVectorBytes)]] = std::uint16_t;  // as many as two Floats
using FourBytes [[gnu::vector_size(kVectorBytes)]] = std::uint8_t;  // as many as four Floats
using FourSignedBytes [[gnu::vector_size(kVectorBytes)]] = std::int8_t;

Floats magnitude(Floats x);
Doubles magnitude(Doubles x);
// The larger one; NaN if either is. `b` is not -0: which zero is returned is left open.
Floats larger(Floats a, Floats b);
Doubles larger(Doubles a, Doubles b);
// `b` if either is NaN.
Floats larger_number(Floats a, Floats b);
Floats smaller_number(Floats a, Floats b);
// IEEE half precision, to the nearest.
Floats from_float16(Words x);
Words to_float16(Floats x);
// Zeros above, or copies of the sign; and without what is above, which is zero.
FloatBits extended(Words x);
FloatBits extended(Bytes x);
FloatInts extended(SignedWords x);
FloatInts extended(SignedBytes x);
Words truncated(FloatBits x);
TwoWords truncated(FloatBits a, FloatBits b);
// In order; each is taken to fit in 16 bits, and limited to what fits in 8.
FourBytes limited_to_bytes(const FloatInts (&x)[4]);
FourSignedBytes limited_to_signed_bytes(const FloatInts (&x)[4]);
// The integer, negated where the float is negative; 0 where that is +0, where `x` is to be 0, too.
FloatInts negated_with(Floats sign, FloatInts x);
Doubles lower_half(Floats x);
Doubles upper_half(Floats x);

template <class T, class Lanes>
struct Vec {
  using Scalar = T;
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  Lanes v;

  Vec() = default;
  explicit Vec(T value) : v(value - Lanes{}) {}  // a sum with zeros would lose the sign of -0
  explicit Vec(Lanes value) : v(value) {}

  static Vec load(const T* p) { return Vec(at<Lanes>(p).v); }
  template <class Half>
  static Vec load(const Half* p) {
    return from(at<Words>(p).v, Half{});
  }
  void store(T* p) const { at<Lanes>(p).v = v; }
  template <class Half>
  void store(Half* p) const {
    at<Words>(p).v = to(Half{});
  }

  // Of floats, as integers: the words of core/bfloat16.hpp, core/low_state.hpp and core/random.hpp.
  using Bits = FloatBits;
  Bits bits() const { return reinterpret_cast<Bits>(v); }
  static Vec from_bits(Bits bits) { return Vec(reinterpret_cast<Lanes>(bits)); }
  static FloatInts ints(Bits bits) { return reinterpret_cast<FloatInts>(bits); }
  static Bits unsigned_bits(FloatInts ints) { return reinterpret_cast<Bits>(ints); }
  static Bits with_sign_of(Vec sign, Bits bits) {
    return unsigned_bits(negated_with(sign.v, ints(bits)));
  }
  static Bits counted() {
    Bits count{};
    for (int lane = 0; lane < kLanes; ++lane) count[lane] = lane;
    return count;
  }
  static Bits load_bits(const std::uint8_t* p) { return extended(at<Bytes>(p).v); }
  static Bits load_bits(const std::uint16_t* p) { return extended(at<Words>(p).v); }
  static Bits load_bits(const std::int8_t* p) {
    return unsigned_bits(extended(at<SignedBytes>(p).v));
  }
  static Bits load_bits(const std::int16_t* p) {
    return unsigned_bits(extended(at<SignedWords>(p).v));
  }
  static void store_bits(Bits bits, std::uint32_t* p) { at<Bits>(p).v = bits; }
  static void store_bits(Bits bits, std::uint16_t* p) { at<Words>(p).v = truncated(bits); }
  static void store_halves(const Bits (&bits)[4], std::uint16_t* p) {
    at<TwoWords>(p).v = truncated(bits[0], bits[1]);
    at<TwoWords>(p + 2 * kLanes).v = truncated(bits[2], bits[3]);
  }
  static void store_bytes(const Bits (&bits)[4], std::uint8_t* p) {
    at<FourBytes>(p).v =
        limited_to_bytes({ints(bits[0]), ints(bits[1]), ints(bits[2]), ints(bits[3])});
  }
  static void store_bytes(const Bits (&bits)[4], std::int8_t* p) {
    at<FourSignedBytes>(p).v =
        limited_to_signed_bytes({ints(bits[0]), ints(bits[1]), ints(bits[2]), ints(bits[3])});
  }

  // The value as a store to that type and a load would give it back.
  Vec rounded_to(const T*) const { return *this; }
  template <class Half>
  Vec rounded_to(const Half*) const {
    return from(to(Half{}), Half{});
  }

  friend Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
  friend Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
  friend Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
  friend Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
  friend Vec abs(Vec a) { return Vec(magnitude(a.v)); }
  friend Vec maximum(Vec a, Vec b) { return Vec(larger(a.v, b.v)); }
  friend Vec larger_number(Vec a, Vec b) { return Vec(larger_number(a.v, b.v)); }
  friend Vec smaller_number(Vec a, Vec b) { return Vec(smaller_number(a.v, b.v)); }
  friend Vec clamp(Vec a, Vec limit) {  // NaN compares false, and stays
    const Lanes raised = -limit.v > a.v ? -limit.v : a.v;
    return Vec(limit.v < raised ? limit.v : raised);
  }
  friend Vec zero_below(Vec a, Vec tiny) { return Vec(abs(a).v < tiny.v ? Lanes{} : a.v); }

 private:
  // Memory of any alignment and type. Not by memcpy(), whose moves are those of integers.
  template <class V>
  struct [[gnu::packed, gnu::may_alias]] Unaligned {
    V v;
  };
  template <class V>
  static const Unaligned<V>& at(const void* p) {
    return *static_cast<const Unaligned<V>*>(p);
  }
  template <class V>
  static Unaligned<V>& at(void* p) {
    return *static_cast<Unaligned<V>*>(p);
  }
  static Vec from(Words x, Float16) { return Vec(from_float16(x)); }
  static Vec from(Words x, BFloat16) { return Vec(reinterpret_cast<Lanes>(extended(x) << 16)); }
  Words to(Float16) const { return to_float16(v); }
  Words to(BFloat16) const {
    const auto bits = reinterpret_cast<FloatBits>(v);
    const FloatBits high = bits >> 16;
    const FloatBits rounded = (bits + (0x7fff + (high & 1))) >> 16;
    return truncated(v != v ? high | 0x40 : rounded);
  }
};

using F32 = Vec<float, Floats>;
using F64 = Vec<double, Doubles>;

inline void widen(F32 a, F64* wide) {
  wide[0] = F64(lower_half(a.v));
  wide[1] = F64(upper_half(a.v));
}
inline void widen(F64 a, F64* wide) { wide[0] = a; }
