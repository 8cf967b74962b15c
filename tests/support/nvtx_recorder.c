// An NVTX tool for tests: NVTX_INJECTION64_PATH=this.so NVTX_LOG=file writes one line for each range, without a GPU.
// The declarations are the parts of NVTX 3's binary interface that are used here, so that no CUDA header is needed.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    int64_t payload;
    int32_t message_type;
    const char *message;
} Event;

typedef void (*Function)(void);
typedef struct {
    size_t size;
    int (*functions)(int module, Function ***table, unsigned *size);
} Callbacks;

enum { CALLBACKS = 1, CORE2 = 5 };
enum { RANGE_PUSH = 4, RANGE_POP = 5, NAME_CATEGORY = 8, REGISTER_STRING = 10, CREATE_DOMAIN = 12 };

static FILE *out;

static void *create_domain(const char *name) { return strdup(name); }

static void *register_string(void *domain, const char *text) { return strdup(text); }

static void name_category(void *domain, uint32_t number, const char *name) {
    fprintf(out, "category\t%s\t%u\t%s\n", domain ? (char *)domain : "-", number, name);
}

static int push(void *domain, const Event *event) {
    fprintf(out, "push\t%s\t%s\t%u\t%06x\t%lld\n", domain ? (char *)domain : "-", event->message ? event->message : "-",
            event->category, event->color & 0xffffff, (long long)event->payload);
    return 0;
}

static int pop(void *domain) {
    fprintf(out, "pop\t%s\n", domain ? (char *)domain : "-");
    return 0;
}

int InitializeInjectionNvtx2(const void *(*export_table)(uint32_t)) {
    const char *path = getenv("NVTX_LOG");
    const Callbacks *callbacks = export_table(CALLBACKS);
    Function **table;
    unsigned size;
    if (!path || !(out = fopen(path, "w")) || !callbacks || !callbacks->functions(CORE2, &table, &size)) return 0;
    setvbuf(out, NULL, _IOLBF, 0);
    *table[RANGE_PUSH] = (Function)push;
    *table[RANGE_POP] = (Function)pop;
    *table[NAME_CATEGORY] = (Function)name_category;
    *table[REGISTER_STRING] = (Function)register_string;
    *table[CREATE_DOMAIN] = (Function)create_domain;
    return 1;
}
