// Records and digests for Python: buffers are held for the length of a call, tensors come as addresses.
#include "module_records.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "digest.h"
#include "dispatch.h"
#include "records.h"
#include "threads.h"

namespace nb = nanobind;

namespace kvwise {
namespace {

// The bytes of any object with a contiguous buffer.
class Held {
   public:
    explicit Held(nb::handle object, bool writable = false) {
        if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) {
            throw nb::python_error();
        }
    }
    Held(Held&& other) noexcept : view_(std::exchange(other.view_, Py_buffer{})) {}
    Held& operator=(Held&&) = delete;
    ~Held() {
        if (view_.obj) PyBuffer_Release(&view_);
    }
    char* data() const { return static_cast<char*>(view_.buf); }
    int64_t size() const { return view_.len; }

   private:
    Py_buffer view_{};
};

std::vector<Held> hold_all(const nb::list& objects, bool writable = false) {
    std::vector<Held> held;
    held.reserve(objects.size());
    for (nb::handle object : objects) held.emplace_back(object, writable);
    return held;
}

void check_sizes(const std::vector<Held>& held, int64_t num_bytes, const char* what) {
    for (const Held& one : held) {
        if (one.size() != num_bytes) {
            throw std::invalid_argument(std::string(what) + " must have " + std::to_string(num_bytes) + " bytes, not " +
                                        std::to_string(one.size()));
        }
    }
}

// What the blocks of one call share.
BlockShape shape_of(const std::vector<int64_t>& f) {
    if (f.size() != 5) throw std::invalid_argument("a block's shape has 5 fields, got " + std::to_string(f.size()));
    const BlockShape shape{f[0], f[1], f[2], f[3], f[4]};
    if (shape.num_layers < 1 || shape.num_layers > 1024 || shape.key_bytes < 0 || shape.value_bytes < 0) {
        throw std::invalid_argument("a block has 1 to 1024 layers of 0 or more bytes");
    }
    return shape;
}

nb::bytes copy_pieces(const std::string& set, const std::vector<std::tuple<uintptr_t, uintptr_t, int64_t>>& list,
                      bool streaming) {
    std::vector<Piece> pieces;
    for (const auto& [source, target, n] : list) {
        if (n < 0) throw std::invalid_argument("a piece of " + std::to_string(n) + " bytes");
        pieces.push_back({reinterpret_cast<const char*>(source), reinterpret_cast<char*>(target), n});
    }
    const InstructionSet& functions = set_called(set);
    Digest digest;
    {
        const nb::gil_scoped_release unlocked;
        digest = copy_and_digest(functions, pieces.data(), int64_t(pieces.size()), streaming);
        finish_streaming();
    }
    return nb::bytes(digest.bytes, sizeof digest.bytes);
}

void seal_blocks(const std::string& set, const std::vector<int64_t>& fields, const nb::list& headers,
                 const std::vector<uintptr_t>& keys, const std::vector<uintptr_t>& values, const nb::list& targets,
                 bool streaming, int num_threads) {
    const InstructionSet& functions = set_called(set);
    const BlockShape shape = shape_of(fields);
    const std::vector<Held> fixed = hold_all(headers), records = hold_all(targets, true);
    check_sizes(fixed, sizeof(FixedHeader), "a header's fixed part");
    check_sizes(records, record_bytes(shape), "the room for a record");
    if (fixed.size() != keys.size() || fixed.size() != values.size() || fixed.size() != records.size()) {
        throw std::invalid_argument("headers, keys, values and targets must be of one number");
    }
    const nb::gil_scoped_release unlocked;
    parallel_for(int64_t(records.size()), num_threads, [&](int64_t i, int) {
        FixedHeader header;
        std::copy_n(fixed[i].data(), sizeof header, reinterpret_cast<char*>(&header));
        seal_block(functions, shape, header, reinterpret_cast<const char*>(keys[i]),
                   reinterpret_cast<const char*>(values[i]), records[i].data(), streaming);
    });
}

std::vector<bool> open_blocks(const std::string& set, const std::vector<int64_t>& fields, const nb::list& views,
                              const nb::list& wanted_keys, const nb::bytes& identity, const nb::bytes& codec,
                              const std::vector<uintptr_t>& keys, const std::vector<uintptr_t>& values, bool streaming,
                              int num_threads) {
    const InstructionSet& functions = set_called(set);
    const BlockShape shape = shape_of(fields);
    const std::vector<Held> records = hold_all(views), asked = hold_all(wanted_keys);
    check_sizes(asked, sizeof(FixedHeader::key), "a key");
    if (identity.size() != sizeof(FixedHeader::identity) || codec.size() != sizeof(FixedHeader::codec)) {
        throw std::invalid_argument("an identity has 32 bytes, a codec 64");
    }
    if (records.size() != keys.size() || records.size() != values.size() || records.size() != asked.size()) {
        throw std::invalid_argument("views, wanted keys, keys and values must be of one number");
    }
    std::vector<char> sound(records.size());  // not bool: threads write neighbours
    {
        const nb::gil_scoped_release unlocked;
        parallel_for(int64_t(records.size()), num_threads, [&](int64_t i, int) {
            sound[i] = open_block(functions, shape, {asked[i].data(), identity.c_str(), codec.c_str()},
                                  records[i].data(), records[i].size(), reinterpret_cast<char*>(keys[i]),
                                  reinterpret_cast<char*>(values[i]), streaming);
        });
    }
    return {sound.begin(), sound.end()};
}

}  // namespace

void bind_records(nb::module_& m) {
    m.def("copy_pieces", &copy_pieces);
    m.def("seal_blocks", &seal_blocks);
    m.def("open_blocks", &open_blocks);
}

}  // namespace kvwise
