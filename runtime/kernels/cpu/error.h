// Errors of kernels: thrown as C++ exceptions, returned through the C ABI as messages, raised in Python as KernelError.
#pragma once

#include <stdint.h>
#include <stdio.h>

#define SAGE_EXPORT extern "C" __attribute__((visibility("default")))

namespace sage {

struct Error {
    const char* rule;  // the broken rule, a format for `number`
    long long number;
};

// The message of an error, `kernel: rule`. It is valid until the next error of this thread.
__attribute__((noinline, cold)) inline const char* message_of(const char* kernel, const Error& error) {
    static thread_local char rule[120], message[200];
    snprintf(rule, sizeof rule, error.rule, error.number);
    snprintf(message, sizeof message, "%s: %s", kernel, rule);
    return message;
}

// Calls a kernel; returns null, or the message of the error that it threw.
template <class Function, class... Args>
inline const char* invoke_guarded(const char* kernel, Function function, Args... args) {
    try {
        function(args...);
        return nullptr;
    } catch (const Error& error) {
        return message_of(kernel, error);
    }
}

}  // namespace sage
