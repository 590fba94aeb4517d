#!/bin/sh
# Starts HAProxy with what Ray Serve wrote for it, on loopback: Ray's template binds the metrics and
# the statistics to every interface, without a setting for it. The frontend is bound as configured.
for argument in "$@"; do
  [ "$previous" = -f ] && config=$argument
  previous=$argument
done
sed -i -e 's/bind \*:/bind 127.0.0.1:/' -e 's/bind :\([0-9]\)/bind 127.0.0.1:\1/' "$config"
echo $$ >> "$FUSIONREC_HAPROXY_PIDS"
exec "$FUSIONREC_HAPROXY" "$@"
