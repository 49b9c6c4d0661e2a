/* A camera for tests: preloaded, it answers for /dev/video7 as a V4L2 driver does, so that FFmpeg opens it as one.

It gives grey pictures of 64x48, 50 a second, and is unplugged after CAMERA_FRAMES of them. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/videodev2.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { WIDTH = 64, HEIGHT = 48, SIZE = WIDTH * HEIGHT * 2, PAGE = 8192, BUFFERS = 4 };
static const char *PATH = "/dev/video7";
static int camera = -1, queue[BUFFERS], queued, given;

static int opened(void) {
    camera = memfd_create("camera", 0); /* its memory is what FFmpeg maps */
    queued = given = 0;
    return ftruncate(camera, PAGE * BUFFERS) ? -1 : camera;
}

#define OPEN(name)                                                                        \
    int name(const char *path, int flags, ...) {                                          \
        va_list more;                                                                     \
        va_start(more, flags);                                                            \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;           \
        va_end(more);                                                                     \
        if (!strcmp(path, PATH)) return opened();                                         \
        return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name))(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define STAT(name, type)                                                                     \
    int name(const char *path, struct type *out) {                                           \
        if (!strcmp(path, PATH)) return memset(out, 0, sizeof *out), out->st_mode = S_IFCHR | 0600, 0; \
        return ((int (*)(const char *, struct type *))dlsym(RTLD_NEXT, #name))(path, out);   \
    }
STAT(stat, stat)
STAT(stat64, stat64)

static void picture(struct v4l2_format *format) {
    struct v4l2_pix_format *pix = &format->fmt.pix;
    pix->width = WIDTH, pix->height = HEIGHT, pix->pixelformat = V4L2_PIX_FMT_YUYV, pix->field = V4L2_FIELD_NONE;
    pix->bytesperline = WIDTH * 2, pix->sizeimage = SIZE;
}

static int next(struct v4l2_buffer *buffer) {
    const char *limit = getenv("CAMERA_FRAMES");
    if (limit && given >= atoi(limit)) return errno = ENODEV, -1;
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    if (!queued) return errno = EAGAIN, -1;
    buffer->index = queue[0], buffer->bytesused = SIZE, buffer->field = V4L2_FIELD_NONE, buffer->sequence = given;
    memmove(queue, queue + 1, --queued * sizeof *queue);
    unsigned char pixels[SIZE];
    memset(pixels, 128, SIZE);
    for (int i = 0; i < SIZE; i += 2) pixels[i] = 16 + 4 * (given % 50); /* brighter from frame to frame */
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    buffer->timestamp.tv_sec = now.tv_sec, buffer->timestamp.tv_usec = now.tv_nsec / 1000;
    buffer->flags = V4L2_BUF_FLAG_TIMESTAMP_MONOTONIC;
    given++;
    return pwrite(camera, pixels, SIZE, (off_t)PAGE * buffer->index) == SIZE ? 0 : -1;
}

static int answer(unsigned long request, void *data) {
    struct v4l2_buffer *buffer = data;
    switch ((unsigned)request) {
    case VIDIOC_QUERYCAP:
        ((struct v4l2_capability *)data)->capabilities = V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_STREAMING;
        return 0;
    case VIDIOC_G_INPUT: return *(int *)data = 0;
    case VIDIOC_ENUMINPUT: return 0;
    case VIDIOC_G_FMT:
    case VIDIOC_S_FMT: return picture(data), 0;
    case VIDIOC_G_PARM:
    case VIDIOC_S_PARM:
        ((struct v4l2_streamparm *)data)->parm.capture.timeperframe = (struct v4l2_fract){1, 50};
        return 0;
    case VIDIOC_REQBUFS: return ((struct v4l2_requestbuffers *)data)->count = BUFFERS, 0;
    case VIDIOC_QUERYBUF: return buffer->length = SIZE, buffer->m.offset = PAGE * buffer->index, 0;
    case VIDIOC_QBUF: return queue[queued++] = buffer->index, 0;
    case VIDIOC_DQBUF: return next(buffer);
    case VIDIOC_STREAMON:
    case VIDIOC_STREAMOFF: return 0;
    }
    return errno = ENOTTY, -1;
}

int ioctl(int file, unsigned long request, ...) {
    va_list more;
    va_start(more, request);
    void *data = va_arg(more, void *);
    va_end(more);
    if (file >= 0 && file == camera) return answer(request, data);
    return ((int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl"))(file, request, data);
}
