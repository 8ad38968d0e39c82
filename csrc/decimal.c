#define _POSIX_C_SOURCE 200809L

#include "decimal.h"

#include <locale.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static int is_part_of_number(unsigned char byte) {
    return (byte >= '0' && byte <= '9') || byte == '.' || byte == '-' || byte == '+' || byte == 'e' ||
           byte == 'E';
}

int km_text_number(const unsigned char *data, int64_t end, int64_t *at, int in_float, double *value,
                   km_error *error) {
    char text[128], *stop; /* ended by NUL, which the data is not */
    const int64_t start = *at;
    size_t length = 0;
    while (start + (int64_t)length < end && is_part_of_number(data[start + (int64_t)length]) &&
           length < sizeof text)
        length++;
    if (length == 0) return km_fail(error, start, "not a finite number");
    if (length == sizeof text) return km_fail(error, start, "a number of more than 127 characters");
    memcpy(text, data + start, length);
    text[length] = '\0';
    /* The decimal point belongs to the locale: where it is not '.', strtod stops there. */
    const char *point = localeconv()->decimal_point;
    char *dot = strchr(text, '.');
    if (dot != NULL && point[0] != '\0' && point[1] == '\0') *dot = point[0];
    *value = in_float ? (double)strtof(text, &stop) : strtod(text, &stop);
    if (*stop != '\0') return km_fail(error, start, "not a finite number");
    if (!isfinite(*value)) return km_fail(error, start, "a number beyond the range of its type");
    *at = start + (int64_t)length;
    return KM_OK;
}
