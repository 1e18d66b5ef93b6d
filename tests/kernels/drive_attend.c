/* Runs heads that tests/kernels/emulated.py wrote to a file, and writes the file anew with what came out. */

#include <stdio.h>
#include <stdlib.h>

#include "attend.c"

#define BUFFERS 13 /* the pointers of struct head, then sizes and the scale */
#define OUT 11
#define SIZES ((sizeof(struct head) - BUFFERS * sizeof(void *)) / 8)

static void check(int good, const char *what) {
    if (!good) {
        fprintf(stderr, "%s\n", what);
        exit(1);
    }
}

int main(int count, char **names) {
    check(count == 3, "usage: drive_attend INPUT OUTPUT");
    FILE *from = fopen(names[1], "rb"), *to = fopen(names[2], "wb");
    check(from && to, "a file cannot be opened");
    struct head head;
    int64_t bytes[BUFFERS], next = 0;
    void *buffers[BUFFERS];
    check(fread(bytes, 8, BUFFERS, from) == BUFFERS, "sizes are missing");
    for (int i = 0; i < BUFFERS; i++) {
        buffers[i] = bytes[i] < 0 ? NULL : malloc(bytes[i] + 1);
        if (bytes[i] >= 0) check((int64_t)fread(buffers[i], 1, bytes[i], from) == bytes[i], "a buffer is cut off");
    }
    memcpy(&head, buffers, sizeof buffers);
    check(fread((char *)&head + sizeof buffers, 8, SIZES, from) == SIZES, "numbers are missing");
    check(fgetc(from) == EOF, "there is more than one head");
    diffsparse_attend(&head, 1, &next);
    for (int i = OUT; i < BUFFERS; i++)
        if (bytes[i] >= 0) fwrite(buffers[i], 1, bytes[i], to);
    check(fclose(to) == 0, "the output cannot be written");
    puts(diffsparse_isa());
    return 0;
}
