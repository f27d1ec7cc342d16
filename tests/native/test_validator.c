/* test_validator.c - what only C can show about the validator: it stays inside the body, inside a constant stack, and
 * every scan path of this machine says the same as the portable one. Build and run:
 *   gcc -std=gnu11 -O1 -g -fsanitize=address,undefined -I_native tests/native/test_validator.c \
 *       _native/gw_validator*.c -lpthread -o t && ./t [seed]
 *   aarch64-linux-gnu-gcc -std=gnu11 -O2 -static ... && qemu-aarch64 ./t
 *
 * Each body is validated where reading one byte too many kills: right before an unreadable page, right behind one, and
 * in a heap block of exactly its size (for AddressSanitizer). */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "gw_validator.h"

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, __func__, #condition); \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

enum { BODY_BYTES_MAX = 1 << 20 };

static const uint64_t HASH_KEY[2] = {0x0706050403020100ull, 0x0f0e0d0c0b0a0908ull};
static uint8_t *room, *room_end; /* BODY_BYTES_MAX readable bytes between two unreadable pages */
static unsigned long verdicts;

static void room_open(void)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uint8_t *all = mmap(NULL, BODY_BYTES_MAX + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(all != MAP_FAILED);
    room = all + page;
    room_end = room + BODY_BYTES_MAX;
    CHECK(mprotect(room, BODY_BYTES_MAX, PROT_READ | PROT_WRITE) == 0);
}

static int same(const gw_verdict *a, const gw_verdict *b)
{
    return a->code == b->code && a->field == b->field && a->flags == b->flags && a->offset == b->offset &&
           a->field_offset == b->field_offset && a->field_bytes == b->field_bytes &&
           a->object_offset == b->object_offset && a->ts_offset == b->ts_offset && a->ts_bytes == b->ts_bytes &&
           a->seq == b->seq && a->boot == b->boot;
}

static void complain(const char *path, const uint8_t *body, size_t bytes, const gw_verdict *a, const gw_verdict *b)
{
    fprintf(stderr, "%s: code %u offset %u, portable: code %u offset %u, for\n", path, a->code, a->offset, b->code,
            b->offset);
    fwrite(body, 1, bytes, stderr);
    fprintf(stderr, "\n");
    exit(1);
}

/* The verdict on a body, after every path has given the same one in all three places. */
static gw_verdict verdict_of(const void *text, size_t bytes)
{
    CHECK(bytes <= BODY_BYTES_MAX);
    gw_verdict expected, got;
    uint8_t *exact = malloc(bytes ? bytes : 1);
    memcpy(exact, text, bytes);
    CHECK(gw_validator_select("portable") == 0);
    gw_validate(exact, bytes, HASH_KEY, &expected);
    for (unsigned i = 0; gw_validator_path(i) != NULL; i++) {
        const char *path = gw_validator_path(i);
        CHECK(gw_validator_select(path) == 0);
        CHECK(gw_validate(exact, bytes, HASH_KEY, &got) == got.code);
        if (!same(&got, &expected))
            complain(path, exact, bytes, &got, &expected);
        memcpy(room_end - bytes, text, bytes);
        gw_validate(room_end - bytes, bytes, HASH_KEY, &got);
        if (!same(&got, &expected))
            complain(path, exact, bytes, &got, &expected);
        memcpy(room, text, bytes);
        gw_validate(room, bytes, HASH_KEY, &got);
        if (!same(&got, &expected))
            complain(path, exact, bytes, &got, &expected);
        verdicts += 3;
    }
    free(exact);
    return expected;
}

static int code_of(const char *text)
{
    return verdict_of(text, strlen(text)).code;
}

/* ------------------------------------------------------------------------------------------------ rules */

#define IN_PAYLOAD(text) "{\"metrics\":{},\"payload\":" text "}"
static const char EVENT[] =
    "{\"ts\":\"2025-09-23T11:18:41Z\",\"seq\":1,\"metrics\":{\"temp_c\":21.5,\"hum\":40.25,\"rpm\":1200},"
    "\"tags\":{\"site\":\"AAL\",\"line\":\"3\"},\"payload\":{\"raw\":\"ok\"}}";

/* A few of each class, so that other processors are held against what is right and not only against themselves;
 * tests/test_validator.py has them all. */
static const struct {
    int code;
    const char *body;
} CASES[] = {
    {GW_CODE_ACCEPTED, EVENT},
    {GW_CODE_ACCEPTED, "{\"metrics\":{}}"},
    {GW_CODE_ACCEPTED, " \t\r\n{ \"metrics\" : { \"a\" : -1.5e-7 } , \"seq\" : 9223372036854775807 } \n"},
    {GW_CODE_ACCEPTED, "{\"\\u006detrics\":{\"\\u0061\":1},\"ts\":\"2024-02-29T00:00:00.123\\u002b01:00\"}"},
    {GW_CODE_ACCEPTED, IN_PAYLOAD("[1.7976931348623158e308,1e-400,0e999999999,\"\\ud83d\\ude00\xf0\x9f\x98\x80\"]")},
    {GW_CODE_ACCEPTED, IN_PAYLOAD("[{\"a\":{\"a\":[true,false,null]}},{\"a\":\"\xc3\xa5\xe2\x82\xac\"}]")},
    {GW_CODE_MALFORMED_JSON, ""},
    {GW_CODE_MALFORMED_JSON, "\xef\xbb\xbf{\"metrics\":{}}"},
    {GW_CODE_MALFORMED_JSON, "{\"metrics\":{}}{}"},
    {GW_CODE_MALFORMED_JSON, "{\"metrics\":{},}"},
    {GW_CODE_MALFORMED_JSON, IN_PAYLOAD("01")},
    {GW_CODE_MALFORMED_JSON, IN_PAYLOAD("1.")},
    {GW_CODE_MALFORMED_JSON, IN_PAYLOAD("1e400")},
    {GW_CODE_MALFORMED_JSON, IN_PAYLOAD("1.797693134862315808e308")},
    {GW_CODE_MALFORMED_JSON, IN_PAYLOAD("\"\\ud800\"")},
    {GW_CODE_MALFORMED_JSON, IN_PAYLOAD("\"\xed\xa0\x80\"")},
    {GW_CODE_MALFORMED_JSON, IN_PAYLOAD("\"\xc0\xaf\"")},
    {GW_CODE_MALFORMED_JSON, IN_PAYLOAD("\"\xf4\x90\x80\x80\"")},
    {GW_CODE_MALFORMED_JSON, IN_PAYLOAD("\"\xef\xbf\xbe\"")},
    {GW_CODE_MALFORMED_JSON, IN_PAYLOAD("\"a\nb\"")},
    {GW_CODE_MALFORMED_JSON, IN_PAYLOAD("[1}")},
    {GW_CODE_NOT_AN_OBJECT, "null"},
    {GW_CODE_NOT_AN_OBJECT, "{\"metrics\":[]}"},
    {GW_CODE_UNKNOWN_FIELD, "{\"metrics\":{},\"x\":1}"},
    {GW_CODE_MISSING_METRICS, "{\"seq\":1}"},
    {GW_CODE_BAD_METRIC_KEY, "{\"metrics\":{\"A\":1}}"},
    {GW_CODE_BAD_METRIC_VALUE, "{\"metrics\":{\"a\":1e400}}"},
    {GW_CODE_BAD_TAG_KEY, "{\"tags\":{\"a-b\":\"\"}}"},
    {GW_CODE_BAD_TAG_VALUE, "{\"tags\":{\"a\":1}}"},
    {GW_CODE_BAD_TS, "{\"ts\":\"2025-02-29T00:00:00Z\"}"},
    {GW_CODE_BAD_TS, "{\"ts\":\"2016-12-31T23:59:60Z\"}"},
    {GW_CODE_BAD_SEQ, "{\"seq\":9223372036854775808}"},
    {GW_CODE_BAD_BOOT, "{\"boot\":-0}"},
    {GW_CODE_DUPLICATE_KEY, "{\"metrics\":{\"a\":1,\"\\u0061\":1}}"},
    {GW_CODE_DUPLICATE_KEY, IN_PAYLOAD("{\"\\ud83d\\ude00\":1,\"\xf0\x9f\x98\x80\":1}")},
};

static void test_rules(void)
{
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++) {
        const int code = code_of(CASES[i].body);
        if (code != CASES[i].code) {
            fprintf(stderr, "code %d, not %d, for %s\n", code, CASES[i].code, CASES[i].body);
            exit(1);
        }
    }
    gw_verdict v = verdict_of(EVENT, sizeof EVENT - 1);
    CHECK(v.flags == (GW_EVENT_HAS_TS | GW_EVENT_HAS_SEQ) && v.seq == 1 && v.ts_offset == 7 && v.ts_bytes == 20);
    CHECK(gw_validate((const uint8_t *)EVENT, (size_t)UINT32_MAX + 1, HASH_KEY, &v) == GW_CODE_BODY_TOO_LARGE);
    CHECK(gw_device_id_ok((const uint8_t *)"AZaz09_-", 8) && !gw_device_id_ok((const uint8_t *)"", 0));
}

/* ------------------------------------------------------------------------------------------------ scans */

/* Every byte value at every distance from the start and the end of a string, a name, a run of spaces. */
static void test_every_byte_at_every_place(void)
{
    static const char *const AROUND[][2] = {
        {"{\"metrics\":{},\"payload\":\"", "\"}"},
        {"{\"metrics\":{\"", "\":1}}"},
        {"{\"metrics\":{},\"", "\":0}"},
        {"", "{\"metrics\":{}}"},
        {"{\"metrics\":{}}", ""},
        {"\"", ""},
        {"", ""},
    };
    static const char FILL[] = {'a', 'a', 'a', ' ', ' ', 'a', ' '};
    uint8_t body[160];
    for (size_t a = 0; a < sizeof AROUND / sizeof AROUND[0]; a++)
        for (unsigned bytes = 1; bytes <= 70; bytes += bytes < 36 ? 1 : 11)
            for (unsigned at = 0; at < bytes; at += bytes < 36 ? 1 : 5)
                for (unsigned c = 0; c < 256; c += bytes < 20 ? 1 : 3) {
                    const size_t before = strlen(AROUND[a][0]), behind = strlen(AROUND[a][1]);
                    memcpy(body, AROUND[a][0], before);
                    memset(body + before, FILL[a], bytes);
                    body[before + at] = (uint8_t)c;
                    memcpy(body + before + bytes, AROUND[a][1], behind);
                    verdict_of(body, before + bytes + behind);
                }
}

/* ------------------------------------------------------------------------------------------------ mutants */

static uint64_t random_state;

static uint32_t random_below(uint32_t n)
{
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 32) % n;
}

static void test_random_changes_of_events(unsigned rounds)
{
    static const char *const PIECES[] = {
        "\"",
        "\\",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        " ",
        "\n",
        "\\u0061",
        "\\ud800",
        "\\udc00",
        "\xc3\xa5",
        "\xe2\x82\xac",
        "\xf0\x9f\x98\x80",
        "\xff",
        "\"metrics\":{},",
        "\"a\":1,",
        "\"a\":",
        "1e308",
        "0.",
        "-",
        "99999999999999999999",
        "null",
        "true",
        "\"k\":{\"k\":[1,2,{}]},",
        "                ",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    };
    uint8_t body[4096];
    while (rounds--) {
        const char *text = CASES[random_below(sizeof CASES / sizeof CASES[0])].body;
        size_t bytes = strlen(text);
        memcpy(body, text, bytes);
        for (unsigned changes = 1 + random_below(4); changes; changes--) {
            const uint32_t at = random_below((uint32_t)bytes + 1);
            if (random_below(2)) {
                const uint32_t most = (uint32_t)bytes - at, wanted = random_below(4);
                const uint32_t cut = wanted < most ? wanted : most;
                memmove(body + at, body + at + cut, bytes - at - cut);
                bytes -= cut;
            } else {
                const char *piece = PIECES[random_below(sizeof PIECES / sizeof PIECES[0])];
                const size_t piece_bytes = strlen(piece);
                memmove(body + at + piece_bytes, body + at, bytes - at);
                memcpy(body + at, piece, piece_bytes);
                bytes += piece_bytes;
            }
        }
        verdict_of(body, bytes);
    }
}

static void test_every_prefix(void)
{
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++)
        for (size_t bytes = 0; bytes < strlen(CASES[i].body); bytes++) {
            const int refused = verdict_of(CASES[i].body, bytes).code != GW_CODE_ACCEPTED;
            CHECK(refused || CASES[i].body[bytes - 1] == '}' || CASES[i].body[bytes - 1] <= ' ');
        }
}

/* ------------------------------------------------------------------------------------------------ limits */

static char *text_at;
static char text[BODY_BYTES_MAX];

static void begin(const char *opening)
{
    text_at = text + sprintf(text, "%s", opening);
}

#define ADD(...) (text_at += sprintf(text_at, __VA_ARGS__))

static int code_of_text(void)
{
    return verdict_of(text, (size_t)(text_at - text)).code;
}

static void test_members(void)
{
    for (int count = 1022; count <= 1023; count++) {
        const int code = count == 1022 ? GW_CODE_ACCEPTED : GW_CODE_TOO_MANY_MEMBERS;
        begin("{\"metrics\":{},\"payload\":{");
        for (int i = 0; i < count; i++)
            ADD("%s\"k%d\":%d", i ? "," : "", i, i);
        ADD("}}");
        CHECK(code_of_text() == code);
        begin("{\"metrics\":{},\"payload\":[");
        for (int i = 0; i < count; i++)
            ADD("%s{\"k\":%d}", i ? "," : "", i);
        ADD("]}");
        CHECK(code_of_text() == code);
    }
    /* A duplicate at every place of objects around the size at which keys move to the table. */
    for (int count = 1; count < 40; count++)
        for (int again = 0; again < count; again++)
            for (int escaped = 0; escaped < 2; escaped++) {
                begin("{\"metrics\":{},\"payload\":[{\"k0\":{\"k1\":0}},{");
                for (int i = 0; i < count; i++)
                    ADD("%s\"k%d\":{\"k%d\":0}", i ? "," : "", i, i);
                CHECK((ADD("}]}"), code_of_text()) == GW_CODE_ACCEPTED);
                text_at -= 3;
                ADD(",\"%s%d\":0}]}", escaped ? "\\u006b" : "k", again);
                CHECK(code_of_text() == GW_CODE_DUPLICATE_KEY);
            }
}

/* ------------------------------------------------------------------------------------------------ stack */

enum { STACK_BYTES = 1 << 20, STACK_BYTES_MAX = 96 << 10 }; /* the sanitizers' red zones included */
static gw_verdict stack_verdict;

static void *validate_text(void *unused)
{
    (void)unused;
    gw_validate((const uint8_t *)text, (size_t)(text_at - text), HASH_KEY, &stack_verdict);
    return NULL;
}

/* How much of a painted stack a validation of `text` touches. */
static __attribute__((no_sanitize("address"))) size_t stack_used(void)
{
    uint8_t *stack = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(stack != MAP_FAILED);
    for (size_t i = 0; i < STACK_BYTES; i++)
        ((volatile uint8_t *)stack)[i] = 0xA5;
    pthread_attr_t attributes;
    pthread_t thread;
    CHECK(pthread_attr_init(&attributes) == 0 && pthread_attr_setstack(&attributes, stack, STACK_BYTES) == 0);
    CHECK(pthread_create(&thread, &attributes, validate_text, NULL) == 0 && pthread_join(thread, NULL) == 0);
    size_t untouched = 0;
    while (untouched < STACK_BYTES && ((volatile uint8_t *)stack)[untouched] == 0xA5)
        untouched++;
    munmap(stack, STACK_BYTES);
    return STACK_BYTES - untouched;
}

static void test_stack_is_constant(void)
{
    size_t most = 0;
    for (unsigned path = 0; gw_validator_path(path) != NULL; path++) {
        CHECK(gw_validator_select(gw_validator_path(path)) == 0);
        static const int DEPTHS[] = {0, 1, 32, 100 * 1000};
        for (int d = 0; d < 4; d++)
            for (int objects = 0; objects < 2; objects++) {
                begin("{\"metrics\":{},\"payload\":");
                for (int i = 0; i < DEPTHS[d]; i++)
                    ADD("%s", objects ? "{\"a\":" : "[");
                ADD("1");
                for (int i = 0; i < DEPTHS[d]; i++)
                    ADD("%s", objects ? "}" : "]");
                ADD("}");
                const size_t used = stack_used();
                CHECK(stack_verdict.code == (DEPTHS[d] > 32 ? GW_CODE_PAYLOAD_TOO_DEEP : GW_CODE_ACCEPTED));
                most = used > most ? used : most;
            }
        /* The whole scratch: wide objects, one in another. */
        begin("{\"metrics\":{},\"payload\":");
        for (int depth = 0; depth < 31; depth++) {
            for (int i = 0; i < 31; i++)
                ADD("%s\"k%d\":0", i ? "," : "{", i);
            ADD(",\"deeper\":");
        }
        ADD("0");
        for (int depth = 0; depth < 31; depth++)
            ADD("}");
        ADD("}");
        const size_t used = stack_used();
        CHECK(stack_verdict.code == GW_CODE_ACCEPTED);
        most = used > most ? used : most;
    }
    printf("stack of a thread that validates: at most %zu bytes\n", most);
    CHECK(most <= STACK_BYTES_MAX);
}

int main(int argc, char **argv)
{
    const uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 20250923;
    random_state = seed | 1;
    room_open();
    printf("scan paths:");
    for (unsigned i = 0; gw_validator_path(i) != NULL; i++)
        printf(" %s", gw_validator_path(i));
    printf(", seed %llu\n", (unsigned long long)seed);
    CHECK(strcmp(gw_validator_selected(), gw_validator_path(0)) == 0);
    CHECK(gw_validator_select("none") == -1);
    test_rules();
    test_every_prefix();
    test_every_byte_at_every_place();
    test_members();
    test_random_changes_of_events(100 * 1000);
    test_stack_is_constant();
    printf("ok, %lu verdicts\n", verdicts);
    return 0;
}
