#include "error.h"

#include <stdarg.h>
#include <stdio.h>

int km_fail(km_error *error, int64_t offset, const char *format, ...) {
    va_list values;
    error->utterance = -1;
    error->offset = offset;
    va_start(values, format);
    (void)vsnprintf(error->cause, sizeof error->cause, format, values);
    va_end(values);
    return KM_FAILED;
}
