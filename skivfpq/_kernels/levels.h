/* Names of what is compiled once for each instruction set, LEVEL. */
#ifndef SKIVFPQ_LEVELS_H
#define SKIVFPQ_LEVELS_H

#define LEVELLED_(name, level) skivfpq_##name##_##level
#define LEVELLED(name, level) LEVELLED_(name, level)

#endif
