# The gateway as a container image. What each RUN does is a script of this repository, which a machine
# without a container engine can run too: scripts/test-image does, step by step as they stand here.
#
#   docker build -t telemetry-gateway --build-arg VERSION=0.1.0 --build-arg REVISION="$(git rev-parse HEAD)" .
#   docker run --read-only --cap-drop ALL --security-opt no-new-privileges -v gateway:/var/lib/gateway \
#       -p 127.0.0.1:8000:8000 -e GATEWAY_MQTT_URL=mqtt://broker.example -e GATEWAY_AUTH_ALLOW_ANONYMOUS=true telemetry-gateway
#
# The base is a dated tag of Debian, whose minimal system `debootstrap` makes as well; its packages come
# from Debian's archive while the image is built, with the security updates of that day. A tag can be
# moved, a digest cannot: to pin it, write what the following line prints, in both places.
#   docker buildx imagetools inspect debian:bookworm-20250520-slim --format '{{.Manifest.Digest}}'
#   FROM debian:bookworm-20250520-slim@sha256:...

FROM debian:bookworm-20250520-slim AS build
WORKDIR /src
# Packages change less often than the source does: a layer of their own.
COPY scripts/bootstrap scripts/bootstrap
RUN sh scripts/bootstrap --packages build
COPY . .
RUN sh scripts/image-build /opt/gateway

FROM debian:bookworm-20250520-slim
COPY scripts/image-install /usr/local/sbin/image-install
RUN sh /usr/local/sbin/image-install 10001 /var/lib/gateway
COPY --from=build /opt/gateway /opt/gateway

ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="telemetry-gateway" \
      org.opencontainers.image.description="Takes device telemetry over HTTP, logs it crash-safe, and delivers it to MQTT" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/debian:bookworm-20250520-slim" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

# Listening outside of the container's own loopback wants auth.allow_anonymous = true in this version,
# and that is not for the image to decide: it is given when the container is started.
ENV PATH=/opt/gateway/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    GATEWAY_HTTP_HOST=0.0.0.0 \
    GATEWAY_LOG_DIRECTORY=/var/lib/gateway/log

# A number, so that an orchestrator sees that it is not root.
USER 10001:10001
WORKDIR /var/lib/gateway
# The only place that is written to.
VOLUME /var/lib/gateway
EXPOSE 8000
# The gateway drains on it, at most http.drain_deadline_ms (10 s); give `docker stop` 25 s.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["gateway", "health"]
ENTRYPOINT ["gateway"]
CMD ["serve"]
