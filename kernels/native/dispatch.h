// Which kernel sets this build holds and which of them this processor runs.
#pragma once

#include "kernels.h"

namespace shardq {

struct BuiltSet {
    const Table* table;
    bool usable;       // this processor, and the operating system's saving of registers, allow it
    const char* why;   // what is missing, when not usable
};

// Slowest first; the last usable one is the default.
struct BuiltSets {
    const BuiltSet* sets;
    int count;
};

BuiltSets built_sets();

}  // namespace shardq
