// In both libraries, so that either knows whether the other is its match.
#include "subquad/c_api.h"

const char* subquad_version(void) { return SUBQUAD_VERSION; }
