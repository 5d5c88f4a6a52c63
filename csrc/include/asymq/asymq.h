// Everything a C++ user of asymq needs.
#pragma once

#include "asymq/fake_quantize.h"
