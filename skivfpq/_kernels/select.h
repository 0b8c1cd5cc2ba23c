/* Selection: the n first of some rows, in any order. */
#ifndef SKIVFPQ_SELECT_H
#define SKIVFPQ_SELECT_H

#include <stdint.h>

/* NAME brings the n first of ROWs to the front (Hoare 1961); BEFORE(a, b) says whether a comes before b. */
#define SELECT(NAME, ROW, BEFORE)                                                                    \
    static void NAME(ROW *rows, int64_t n_rows, int64_t n) {                                         \
        int64_t first = 0, last = n_rows - 1;                                                        \
        while (first < last) {                                                                       \
            ROW pivot = rows[first + (last - first) / 2];                                            \
            int64_t i = first, j = last;                                                             \
            while (i <= j) {                                                                         \
                while (BEFORE(rows[i], pivot)) i++;                                                  \
                while (BEFORE(pivot, rows[j])) j--;                                                  \
                if (i <= j) {                                                                        \
                    ROW row = rows[i];                                                               \
                    rows[i++] = rows[j], rows[j--] = row;                                            \
                }                                                                                    \
            }                                                                                        \
            if (n - 1 <= j) last = j;                                                                \
            else if (n - 1 >= i) first = i;                                                          \
            else return;                                                                             \
        }                                                                                            \
    }

#endif
