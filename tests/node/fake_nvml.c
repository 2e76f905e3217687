/* An NVML of one card that answers from a text file: "memory USED" (absent: not supported), then "PID BYTES" per process
 * ("n/a" for bytes that are not available).  Only what the testbed calls.  Compiled by the tests with -DSTATE="path". */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7 };

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned int pid; unsigned long long used; unsigned int gpu, compute; } process_t;

static int card;

int nvmlInit_v2(void) { return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 1; return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device)
{
	if (index != 0)
		return INVALID_ARGUMENT;
	*device = &card;
	return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory)
{
	FILE *state = fopen(STATE, "r");
	char word[32], value[32];
	int code = NOT_SUPPORTED;

	while (device == &card && fscanf(state, "%31s %31s", word, value) == 2)
		if (!strcmp(word, "memory")) {
			memory->total = 24ULL << 30;
			memory->used = strtoull(value, NULL, 10);
			memory->free = memory->total - memory->used;
			code = SUCCESS;
		}
	fclose(state);
	return code;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned int *count, process_t *table)
{
	FILE *state = fopen(STATE, "r");
	char word[32], value[32];
	unsigned int room = *count, found = 0;

	while (device == &card && fscanf(state, "%31s %31s", word, value) == 2) {
		if (!strcmp(word, "memory"))
			continue;
		if (found < room) {
			table[found].pid = strtoul(word, NULL, 10);
			table[found].used = strcmp(value, "n/a") ? strtoull(value, NULL, 10) : ~0ULL;
			table[found].gpu = table[found].compute = ~0U;
		}
		found++;
	}
	fclose(state);
	*count = found;
	return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}
